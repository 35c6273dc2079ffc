#pragma once

#include <cutlass/fast_math.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/attention/decode/softmax.hpp"
#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// Where results go. Part of an item: rows of O as they are, and their statistics, in the place of
/// the CTA for the part that it begins with, or for the one that it ends with.
///
/// A part is there when its flag is the call's ticket. Flags need no clearing beforehand: memory
/// that was never a flag is not a ticket but by chance, once in 2^64. Where the same call comes
/// again (a graph's replay), the last to need the flags has cleared them.
struct DecodeResults {
  float const* sinks;
  void* out;                  // (total_q, heads_q, head_dim_v)
  float* lse;                 // (heads_q, total_q)
  float* partial_out;         // (2, ctas, kTileRows, kHeadDim)
  RowStatistics* statistics;  // (2, ctas, kTileRows)
  uint64_t* flags;            // (2, ctas)
  uint64_t ticket;
  bool is_bfloat16;  // what `out` is where the kernel does not say it, or float16
};

/// Writes one part: the result, or what the last of the item's parts makes the result of.
template <class Traits>
class DecodeEpilogue {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;

  // All consumers combine the parts of an item.
  static constexpr int kThreads = Traits::kConsumers * cutlass::NumThreadsPerWarpGroup;
  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = kThreads / kLanes;
  static constexpr int kTileRows = Traits::kTileRows;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kVector = 4;  // floats of 16 bytes
  static constexpr int kRowsAtOnce = 2;
  // A thread's columns are so many next to one another, and as many again four times as far on.
  static constexpr int kRun = Traits::kEightBits ? 4 : 2;

 public:
  CUTLASS_DEVICE DecodeEpilogue(CachedCall const& call, DecodeResults const& results,
                                cutlass::FastDivmod const& group, float scale_log2,
                                SharedStorage& shared)
      : call_(call), results_(results), group_(group), scale_log2_(scale_log2), shared_(shared) {}

  /// Stores what consumers have of O, as (row, column).
  template <class Softmax, class Rows>
  CUTLASS_DEVICE void store(Walk const& walk, Softmax const& softmax, Rows const& rows,
                            AccumulatorPlace const& place) const {
    if (walk.parts().count == 1) {
      store_result(walk, softmax, rows, place);
    } else {
      store_part(walk, softmax, rows, place);
    }
  }

  /// Behind the stores.
  CUTLASS_DEVICE void finish(Walk const& walk) const {
    WorkParts const parts = walk.parts();
    if (parts.count > 1 && is_last(walk, parts)) combine(walk, parts);
  }

 private:
  CUTLASS_DEVICE static int consumer_thread() {
    return threadIdx.x - cutlass::NumThreadsPerWarpGroup;
  }

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

  CUTLASS_DEVICE RowResult result_of(Place const& place, RowStatistics const& statistics) const {
    float const sink = results_.sinks == nullptr ? -INFINITY : __ldg(results_.sinks + place.head);
    return RowResult(statistics, scale_log2_, sink);
  }
  CUTLASS_DEVICE Element* out_row(Place const& place) const {
    return static_cast<Element*>(results_.out) +
           (place.row * call_.heads_q + place.head) * call_.head_dim_v;
  }
  template <int kCount>
  CUTLASS_DEVICE void store_rounded(cutlass::Array<float, kCount> const& x, Element* to) const {
    auto store = [&](auto rounded_type) {
      using Out = decltype(rounded_type);
      *reinterpret_cast<cutlass::Array<Out, kCount>*>(to) =
          cutlass::NumericArrayConverter<Out, float, kCount>{}(x);
    };
    if constexpr (Traits::kEightBits) {
      results_.is_bfloat16 ? store(cutlass::bfloat16_t{}) : store(cutlass::half_t{});
    } else {
      store(Element{});
    }
  }
  CUTLASS_DEVICE void store_lse(Place const& place, float lse) const {
    results_.lse[int64_t{place.head} * call_.total_q + place.row] = lse;
  }

  template <class Softmax, class Rows>
  CUTLASS_DEVICE void store_result(Walk const& walk, Softmax const& softmax, Rows const& rows,
                                   AccumulatorPlace const& first) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size<0>(rows); ++i) {
      int const row = first.row + 8 * i;
      if (row >= walk.tile().rows) continue;
      Place const place = place_of_row(walk, row);
      RowResult const result = result_of(place, softmax.statistics(i));
      if (first.column == 0) store_lse(place, result.lse);
      Element* const out = out_row(place) + first.column;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(rows); col += kRun) {
        if (first.column + 4 * col >= call_.head_dim_v) break;
        cutlass::Array<float, kRun> run;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kRun; ++j) run[j] = rows(i, col + j) * result.factor;
        store_rounded(run, out + 4 * col);
      }
    }
  }

  /// The place of a part. CTA `first` of the item's ends with its part, the others begin with it.
  CUTLASS_DEVICE static int64_t slot(WorkParts const& parts, int part) {
    return (part == 0 ? gridDim.x : 0) + parts.first + part;
  }
  CUTLASS_DEVICE static int64_t own_slot(Walk const& walk) {
    return (walk.is_first_part() ? gridDim.x : 0) + blockIdx.x;
  }

  template <class Softmax, class Rows>
  CUTLASS_DEVICE void store_part(Walk const& walk, Softmax const& softmax, Rows const& rows,
                                 AccumulatorPlace const& first) const {
    using namespace cute;
    int64_t const slot = own_slot(walk);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size<0>(rows); ++i) {
      int const row = first.row + 8 * i;
      if (row >= walk.tile().rows) continue;
      if (first.column == 0) results_.statistics[slot * kTileRows + row] = softmax.statistics(i);
      float* const out = results_.partial_out + (slot * kTileRows + row) * kHeadDim + first.column;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(rows); col += kRun) {
        cutlass::AlignedArray<float, kRun> run;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kRun; ++j) run[j] = rows(i, col + j);
        *reinterpret_cast<cutlass::AlignedArray<float, kRun>*>(out + 4 * col) = run;
      }
    }
  }

  /// Tells that this part is there, and asks whether all are: the last one to tell finds them all,
  /// or several that tell at once do. They then write the same result.
  CUTLASS_DEVICE bool is_last(Walk const& walk, WorkParts const& parts) const {
    sm90::barrier_sync(sm90::NamedBarrier::kPartStored, 0, kThreads);
    if (consumer_thread() < kLanes) {
      int const lane = threadIdx.x % kLanes;
      if (lane == 0) {
        __threadfence();  // of all consumers' stores, which the barrier has put before it
        store_flag(own_slot(walk), results_.ticket);
      }
      // Each of two parts' stores before its own loads, in one order for all: one sees the other.
      __syncwarp();
      __threadfence();
      bool all = true;
      for (int part = lane; part < parts.count; part += kLanes) {
        all &= load_flag(slot(parts, part)) == results_.ticket;
      }
      all = __all_sync(0xffffffff, all);
      if (lane == 0) shared_.is_last = all;
      __threadfence();
    }
    sm90::barrier_sync(sm90::NamedBarrier::kPartStored, 0, kThreads);
    return shared_.is_last;
  }
  CUTLASS_DEVICE void store_flag(int64_t slot, uint64_t value) const {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(results_.flags + slot), "l"(value)
                 : "memory");
  }
  CUTLASS_DEVICE uint64_t load_flag(int64_t slot) const {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(results_.flags + slot)
                 : "memory");
    return value;
  }

  /// The result of all parts, always in the same order. A warp has kRowsAtOnce rows at a time; its
  /// lanes know the statistics of a part each, and add up some columns each.
  CUTLASS_DEVICE void combine(Walk const& walk, WorkParts const& parts) const {
    for (int part = consumer_thread(); part < parts.count; part += kThreads) {
      store_flag(slot(parts, part), ~results_.ticket);
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (int row = consumer_thread() / kLanes; row < walk.tile().rows;
         row += kWarps * kRowsAtOnce) {
      combine_rows(walk, parts, row);
    }
  }

  CUTLASS_DEVICE void combine_rows(Walk const& walk, WorkParts const& parts, int first_row) const {
    constexpr int kVectors = kHeadDim / kVector;
    constexpr int kVectorsOfLane = (kVectors + kLanes - 1) / kLanes;
    int const lane = threadIdx.x % kLanes;
    // Rows behind the tile's last one are read as that one.
    auto row_of = [&](int i) { return min(first_row + i * kWarps, walk.tile().rows - 1); };
    auto statistics_of = [&](int part, int i) {
      float2 const pair = __ldcg(reinterpret_cast<float2 const*>(
          results_.statistics + slot(parts, part) * kTileRows + row_of(i)));
      return RowStatistics{pair.x, pair.y};
    };
    // A lane knows a part of each group of kLanes.
    RowStatistics own[kRowsAtOnce];
    float most[kRowsAtOnce], sum[kRowsAtOnce], weight[kRowsAtOnce];
    float4 out[kRowsAtOnce][kVectorsOfLane] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRowsAtOnce; ++i) most[i] = -INFINITY, sum[i] = 0.f;
    for (int first = (parts.count - 1) / kLanes * kLanes; first >= 0; first -= kLanes) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRowsAtOnce; ++i) {
        own[i] = first + lane < parts.count ? statistics_of(first + lane, i)
                                            : RowStatistics{-INFINITY, 0.f};
        most[i] = fmaxf(most[i], own[i].most);
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRowsAtOnce; ++i) {
      most[i] = of_warp(most[i], [](float a, float b) { return fmaxf(a, b); });
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (int first = 0; first < parts.count; first += kLanes) {
      int const count = min(kLanes, parts.count - first);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRowsAtOnce; ++i) {
        float const origin = most[i] == -INFINITY ? 0.f : most[i];
        if (first > 0 && lane < count) own[i] = statistics_of(first + lane, i);
        weight[i] = sm90::exp2_mufu((own[i].most - origin) * scale_log2_);
        if (lane < count) sum[i] += own[i].sum * weight[i];
      }
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRowsAtOnce; ++i) {
          float const weight_of_part = __shfl_sync(0xffffffff, weight[i], j);
          auto const* const from = reinterpret_cast<float4 const*>(
              results_.partial_out + (slot(parts, first + j) * kTileRows + row_of(i)) * kHeadDim);
          CUTLASS_PRAGMA_UNROLL
          for (int k = 0; k < kVectorsOfLane; ++k) {
            float4 const x = __ldcg(from + (lane + k * kLanes) % kVectors);
            out[i][k].x += weight_of_part * x.x;
            out[i][k].y += weight_of_part * x.y;
            out[i][k].z += weight_of_part * x.z;
            out[i][k].w += weight_of_part * x.w;
          }
        }
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRowsAtOnce; ++i) {
      sum[i] = of_warp(sum[i], [](float a, float b) { return a + b; });
      if (first_row + i * kWarps >= walk.tile().rows) continue;
      Place const place = place_of_row(walk, row_of(i));
      RowResult const result = result_of(place, {most[i], sum[i]});
      if (lane == 0) store_lse(place, result.lse);
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kVectorsOfLane; ++k) {
        int const column = (lane + k * kLanes) * kVector;
        if (column >= call_.head_dim_v) continue;
        float4 const& x = out[i][k];
        cutlass::Array<float, kVector> const scaled{x.x * result.factor, x.y * result.factor,
                                                    x.z * result.factor, x.w * result.factor};
        store_rounded(scaled, out_row(place) + column);
      }
    }
  }

  template <class Join>
  CUTLASS_DEVICE static float of_warp(float x, Join const& join) {
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      x = join(x, __shfl_xor_sync(0xffffffff, x, lanes));
    }
    return x;
  }

  CachedCall const& call_;
  DecodeResults const& results_;
  cutlass::FastDivmod const& group_;
  float scale_log2_;
  SharedStorage& shared_;
};

}  // namespace cute_kernels::attention
