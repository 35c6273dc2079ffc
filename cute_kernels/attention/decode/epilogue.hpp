#pragma once

#include <cutlass/fast_math.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/mainloop.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// Where results go. Part of an item: rows of O as they are, and their statistics, in the place of
/// the CTA for the part that it begins with, or for the one that it ends with.
struct DecodeResults {
  float const* sinks;
  void* out;                  // (total_q, heads_q, head_dim_v)
  float* lse;                 // (heads_q, total_q)
  float* partial_out;         // (2, ctas, kTileRows, kHeadDim)
  RowStatistics* statistics;  // (2, ctas, kTileRows)
  int* arrivals;              // (ctas): 0 before, and after
  int ctas;
};

/// Writes one part: the result, or what the last of the item's parts makes the result of.
template <class Traits>
class DecodeEpilogue {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Mainloop = DecodeMainloop<Traits>;
  using Softmax = typename Mainloop::Softmax;
  using Walk = WorkWalk<Traits>;

  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kTileRows = Traits::kTileRows;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kVector = 4;  // floats of 16 bytes

 public:
  CUTLASS_DEVICE DecodeEpilogue(CachedCall const& call, DecodeResults const& results,
                                cutlass::FastDivmod const& group, float scale_log2,
                                SharedStorage& shared)
      : call_(call), results_(results), group_(group), scale_log2_(scale_log2), shared_(shared) {}

  template <class Output>
  CUTLASS_DEVICE void store(Walk const& walk, Softmax const& softmax, Output& out) {
    auto rows = cute::make_tensor(out.data(), sm90::accumulator_rows_cols(out.layout()));
    WorkParts const parts = walk.parts();
    if (parts.count == 1) {
      store_result(walk, softmax, rows);
      return;
    }
    store_part(walk, softmax, rows);
    if (arrive_last(parts)) combine(walk, parts);
  }

 private:
  /// A row of the item in the tensors.
  struct Place {
    int64_t row;  // of Q and O
    int head;
  };
  CUTLASS_DEVICE Place place_of_row(Walk const& walk, int row) const {
    int query, head;
    group_(query, head, walk.tile().first_row + row);
    return {int64_t{walk.sequence().row_q} + query, walk.head() * walk.sequence().group + head};
  }

  CUTLASS_DEVICE RowResult finish(Place const& place, RowStatistics const& statistics) const {
    float const sink = results_.sinks == nullptr ? -INFINITY : __ldg(results_.sinks + place.head);
    return RowResult(statistics, scale_log2_, sink);
  }
  CUTLASS_DEVICE Element* out_row(Place const& place) const {
    return static_cast<Element*>(results_.out) +
           (place.row * call_.heads_q + place.head) * call_.head_dim_v;
  }
  CUTLASS_DEVICE void store_lse(Place const& place, float lse) const {
    results_.lse[int64_t{place.head} * call_.total_q + place.row] = lse;
  }

  template <class Rows>
  CUTLASS_DEVICE void store_result(Walk const& walk, Softmax const& softmax,
                                   Rows const& rows) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size<0>(rows); ++i) {
      int const row = Mainloop::first_row() + 8 * i;
      if (row >= walk.tile().rows) continue;
      Place const place = place_of_row(walk, row);
      RowResult const result = finish(place, {softmax.most(i), softmax.sum(i)});
      if (Mainloop::first_column() == 0) store_lse(place, result.lse);
      Element* const out = out_row(place) + Mainloop::first_column();
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(rows); col += 2) {
        if (Mainloop::first_column() + 4 * col >= call_.head_dim_v) break;
        cutlass::NumericArrayConverter<Element, float, 2> const round;
        cutlass::Array<float, 2> const pair{rows(i, col) * result.factor,
                                            rows(i, col + 1) * result.factor};
        *reinterpret_cast<cutlass::Array<Element, 2>*>(out + 4 * col) = round(pair);
      }
    }
  }

  /// The place of a part. CTA `first` of the item's ends with its part, the others begin with it.
  CUTLASS_DEVICE int64_t slot(WorkParts const& parts, int part) const {
    return (part == 0 ? results_.ctas : 0) + parts.first + part;
  }

  template <class Rows>
  CUTLASS_DEVICE void store_part(Walk const& walk, Softmax const& softmax, Rows const& rows) const {
    using namespace cute;
    int64_t const slot = (walk.is_first_part() ? results_.ctas : 0) + int64_t{blockIdx.x};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size<0>(rows); ++i) {
      int const row = Mainloop::first_row() + 8 * i;
      if (row >= walk.tile().rows) continue;
      if (Mainloop::first_column() == 0) {
        results_.statistics[slot * kTileRows + row] = {softmax.most(i), softmax.sum(i)};
      }
      float* const out =
          results_.partial_out + (slot * kTileRows + row) * kHeadDim + Mainloop::first_column();
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(rows); col += 2) {
        *reinterpret_cast<float2*>(out + 4 * col) = {rows(i, col), rows(i, col + 1)};
      }
    }
  }

  /// Whether this part is the last of its item's to be stored. Then all others are seen.
  CUTLASS_DEVICE bool arrive_last(WorkParts const& parts) const {
    __threadfence();
    sm90::barrier_sync(sm90::NamedBarrier::kConsumers, 0, kThreads);
    if (threadIdx.x % kThreads == 0) {
      int* const arrivals = results_.arrivals + parts.first;
      shared_.arrived = atomicAdd(arrivals, 1);
      if (shared_.arrived + 1 == parts.count) *arrivals = 0;  // for the next call with this work
      __threadfence();
    }
    sm90::barrier_sync(sm90::NamedBarrier::kConsumers, 0, kThreads);
    return shared_.arrived + 1 == parts.count;
  }

  /// The result of all parts, always in the same order. A warp has a row at a time; its lanes know
  /// the statistics of a part each, and add up some columns each.
  CUTLASS_DEVICE void combine(Walk const& walk, WorkParts const& parts) const {
    constexpr int kVectors = kHeadDim / kVector;
    constexpr int kVectorsOfLane = (kVectors + kLanes - 1) / kLanes;
    int const lane = threadIdx.x % kLanes;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int row = threadIdx.x / kLanes % kWarps; row < walk.tile().rows; row += kWarps) {
      auto statistics_of = [&](int part) {
        float2 const pair = __ldcg(reinterpret_cast<float2 const*>(
            results_.statistics + slot(parts, part) * kTileRows + row));
        return RowStatistics{pair.x, pair.y};
      };
      float most = -INFINITY;
      for (int part = lane; part < parts.count; part += kLanes) {
        most = fmaxf(most, statistics_of(part).most);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
      }
      float const origin = most == -INFINITY ? 0.f : most;
      float sum = 0.f;
      float4 out[kVectorsOfLane] = {};
      CUTLASS_PRAGMA_NO_UNROLL
      for (int first = 0; first < parts.count; first += kLanes) {
        int const count = min(kLanes, parts.count - first);
        float weight = 0.f;
        if (lane < count) {
          RowStatistics const own = statistics_of(first + lane);
          weight = sm90::exp2_mufu((own.most - origin) * scale_log2_);
          sum += own.sum * weight;
        }
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
          float const weight_of_part = __shfl_sync(0xffffffff, weight, i);
          auto const* const from = reinterpret_cast<float4 const*>(
              results_.partial_out + (slot(parts, first + i) * kTileRows + row) * kHeadDim);
          CUTLASS_PRAGMA_UNROLL
          for (int j = 0; j < kVectorsOfLane; ++j) {
            float4 const x = __ldcg(from + (lane + j * kLanes) % kVectors);
            out[j].x += weight_of_part * x.x;
            out[j].y += weight_of_part * x.y;
            out[j].z += weight_of_part * x.z;
            out[j].w += weight_of_part * x.w;
          }
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, lanes);
      }
      Place const place = place_of_row(walk, row);
      RowResult const result = finish(place, {most, sum});
      if (lane == 0) store_lse(place, result.lse);
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kVectorsOfLane; ++j) {
        int const column = (lane + j * kLanes) * kVector;
        if (column >= call_.head_dim_v) break;
        cutlass::NumericArrayConverter<Element, float, kVector> const round;
        cutlass::Array<float, kVector> const scaled{
            out[j].x * result.factor, out[j].y * result.factor, out[j].z * result.factor,
            out[j].w * result.factor};
        *reinterpret_cast<cutlass::Array<Element, kVector>*>(out_row(place) + column) =
            round(scaled);
      }
    }
  }

  CachedCall const& call_;
  DecodeResults const& results_;
  cutlass::FastDivmod const& group_;
  float scale_log2_;
  SharedStorage& shared_;
};

}  // namespace cute_kernels::attention
