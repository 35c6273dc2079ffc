#pragma once

#include <cutlass/fast_math.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/part_rows.hpp"
#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/attention/decode/softmax.hpp"
#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/quad.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// Where results go. Part of an item: rows of O as they are, and their statistics, in the place of
/// the CTA for the part that it begins with, or for the one that it ends with.
///
/// An item's parts are counted as they come, behind the call's ticket: each CTA that
/// has one makes the counter the call's if it is not yet, before its own products. So counters need
/// no clearing beforehand: memory that was never a counter has not the ticket but by chance, once
/// in 2^48. Where the same call comes again (a graph's replay), the last part has cleared the
/// counter.
///
/// A key head's query heads may be those of gridDim.y tiles: the CTAs (x, y) have share x of the
/// work for tile y. Elsewhere gridDim.y is 1.
struct DecodeResults {
  float const* sinks;
  void* out;                  // (total_q, heads_q, head_dim_v)
  float* lse;                 // (heads_q, total_q)
  float* partial_out;         // (gridDim.y, 2, gridDim.x, PartRows::kCount, kHeadDim)
  RowStatistics* statistics;  // (gridDim.y, 2, gridDim.x, PartRows::kCount)
  uint64_t* counters;  // (gridDim.y, gridDim.x), of the item of which the CTA has the first part
  uint64_t ticket;     // of which a counter has the lower 48 bits
  bool is_bfloat16;    // what `out` is where the kernel does not say it, or float16
};

/// Writes one part: the result, or what the last of the item's parts makes the result of.
template <class Traits>
class DecodeEpilogue {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;
  using PartRows = attention::PartRows<Traits>;

  // All consumers combine the parts of an item.
  static constexpr int kThreads = Traits::kConsumers * cutlass::NumThreadsPerWarpGroup;
  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = kThreads / kLanes;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kVector = 4;  // floats of 16 bytes
  // Combining, of a lane: vectors of a row, and vectors of all rows and parts that it reads at
  // once.
  static constexpr int kLanesOfRow = kHeadDim / kVector < kLanes ? kHeadDim / kVector : kLanes;
  static constexpr int kLanesOfParts = kLanes / kLanesOfRow;
  static constexpr int kVectorsOfLane = kHeadDim / kVector / kLanesOfRow;
  static constexpr int64_t kVectorsOfPart = int64_t{PartRows::kCount} * kHeadDim / kVector;
  static constexpr int kVectorsAtOnce = 16;
  static constexpr int kFewParts = kVectorsOfLane > 2 ? 2 : 4;
  static constexpr int kCountBits = 16;  // of a counter
  // A thread's columns are so many next to one another, and as many again four times as far on.
  static constexpr int kRun = Traits::kByWarps ? 4 : 2;
  // Whether the four threads of a row change columns with one another, so that each stores 16
  // bytes: long rows otherwise are as many stores of 4.
  static constexpr bool kChangesColumns = kHeadDim > 256;

 public:
  CUTLASS_DEVICE DecodeEpilogue(CachedCall const& call, DecodeResults const& results,
                                cutlass::FastDivmod const& group, float scale_log2,
                                SharedStorage& shared)
      : call_(call), results_(results), group_(group), scale_log2_(scale_log2), shared_(shared) {}

  /// Before the first part's products: what it asks of memory is there when they are. The CTA's
  /// parts of less than an item are of the one in which its share begins, and of the one that
  /// begins in it last.
  CUTLASS_DEVICE void begin(typename Traits::Dealer::Share const& share) const {
    open_counters(find_counters(share));
  }
  /// The same in two steps, between which there is something else to do than to wait for memory.
  struct Counters {
    uint64_t* of_item[2] = {nullptr, nullptr};
    uint64_t found[2];
  };
  CUTLASS_DEVICE Counters find_counters(typename Traits::Dealer::Share const& share) const {
    Counters counters;
    if (consumer_thread() != 0 || share.place.block >= share.line.blocks) return counters;
    int const first = quotient(share.place.item, share.line.share);
    counters.of_item[0] = counter(first), counters.of_item[1] = counter(blockIdx.x);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) counters.found[i] = load_relaxed(counters.of_item[i]);
    return counters;
  }
  CUTLASS_DEVICE void open_counters(Counters const& counters) const {
    if (counters.of_item[0] == nullptr) return;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      // If another part has been faster, the counter is the call's, and stays as it is.
      if ((counters.found[i] ^ no_parts()) >> kCountBits != 0) {
        exchange_if_equal(counters.of_item[i], counters.found[i], no_parts());
      }
    }
  }

  /// Stores what consumers have of O, as (row, column).
  template <class Softmax, class Rows>
  CUTLASS_DEVICE void store(Walk const& walk, WorkParts const& parts, Softmax const& softmax,
                            Rows const& rows, AccumulatorPlace const& place) const {
    if (parts.count == 1) {
      store_result(walk, softmax, rows, place);
    } else {
      store_part(walk, softmax, rows, place);
    }
  }

  /// Behind the stores.
  CUTLASS_DEVICE void finish(Walk const& walk, WorkParts const& parts) const {
    if (parts.count > 1 && is_last(parts)) combine(walk, parts);
  }

 private:
  CUTLASS_DEVICE static int consumer_thread() {
    return threadIdx.x - Traits::kProducers * cutlass::NumThreadsPerWarpGroup;
  }

  /// A row of the item in the tensors.
  struct Place {
    int64_t row;  // of Q and O
    int head;
  };
  CUTLASS_DEVICE Place place_of_row(Walk const& walk, int row) const {
    int query, head;
    group_(query, head, walk.tile().first_row + PartRows::in_tile(row));
    int const tile_of_heads = walk.head() * gridDim.y + blockIdx.y;
    int const key_head = tile_of_heads * PartRows::kHeads + PartRows::head(row);
    return {int64_t{walk.sequence().row_q} + query, key_head * walk.sequence().group + head};
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
      bool const is_there = PartRows::in_tile(row) < walk.tile().rows;
      if (kChangesColumns ? !__any_sync(0xffffffff, is_there) : !is_there) continue;
      Place const place = place_of_row(walk, row);
      RowResult const result = result_of(place, softmax.statistics(i));
      if (is_there && first.column == 0) store_lse(place, result.lse);
      Element* const out = out_row(place) + first.column;
      if constexpr (kChangesColumns) {
        store_vectors(is_there, rows(i, _), result.factor, out, first.column);
      } else {
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
  }

  /// A row's columns times `factor`, of which a thread has pairs 8 apart, from number `column` on,
  /// for `out`. By all four threads of the row, which then have 8 columns each of 32.
  template <class Row>
  CUTLASS_DEVICE void store_vectors(bool is_there, Row const& row, float factor, Element* out,
                                    int column) const {
    constexpr int kQuad = 4;
    constexpr int kPairs = decltype(cute::size(row))::value / 2;
    static_assert(kPairs % kQuad == 0);
    int const moves_by = threadIdx.x % kQuad * 6;  // from its pairs to its vectors
    CUTLASS_PRAGMA_UNROLL
    for (int pair = 0; pair < kPairs; pair += kQuad) {
      uint32_t own[kQuad];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kQuad; ++j) {
        int const col = 2 * (pair + j);
        cutlass::Array<float, 2> const scaled{row(col) * factor, row(col + 1) * factor};
        auto const rounded = cutlass::NumericArrayConverter<Element, float, 2>{}(scaled);
        own[j] = reinterpret_cast<uint32_t const&>(rounded);
      }
      sm90::transpose_among_quad(own);
      int const at = 8 * pair + moves_by;
      if (is_there && column + at < call_.head_dim_v) {
        *reinterpret_cast<uint4*>(out + at) = uint4{own[0], own[1], own[2], own[3]};
      }
    }
  }

  /// The first of the places for parts of the CTAs (x, blockIdx.y).
  CUTLASS_DEVICE static int64_t first_slot() { return int64_t{2} * gridDim.x * blockIdx.y; }
  /// The place of a part. CTA `first` of the item's ends with its part, the others begin with it.
  CUTLASS_DEVICE static int64_t slot(WorkParts const& parts, int part) {
    return first_slot() + (part == 0 ? gridDim.x : 0) + parts.first + part;
  }
  CUTLASS_DEVICE static int64_t own_slot(Walk const& walk) {
    return first_slot() + (walk.is_first_part() ? gridDim.x : 0) + blockIdx.x;
  }
  /// Of the item of which CTA (x, blockIdx.y) has the first part.
  CUTLASS_DEVICE uint64_t* counter(int x) const {
    return results_.counters + gridDim.x * blockIdx.y + x;
  }

  template <class Softmax, class Rows>
  CUTLASS_DEVICE void store_part(Walk const& walk, Softmax const& softmax, Rows const& rows,
                                 AccumulatorPlace const& first) const {
    using namespace cute;
    int64_t const slot = own_slot(walk);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size<0>(rows); ++i) {
      int const row = first.row + 8 * i;
      bool const is_there = PartRows::in_tile(row) < walk.tile().rows;
      if (kChangesColumns ? !__any_sync(0xffffffff, is_there) : !is_there) continue;
      if (is_there && first.column == 0) {
        RowStatistics const own = softmax.statistics(i);
        __stcg(reinterpret_cast<float2*>(results_.statistics + slot * PartRows::kCount + row),
               float2{own.most, own.sum});
      }
      float* const out =
          results_.partial_out + (slot * PartRows::kCount + row) * kHeadDim + first.column;
      if constexpr (kChangesColumns) {
        store_vectors(is_there, rows(i, _), out);
      } else {
        CUTLASS_PRAGMA_UNROLL
        for (int col = 0; col < size<1>(rows); col += kRun) {
          if constexpr (kRun == 4) {
            __stcg(reinterpret_cast<float4*>(out + 4 * col),
                   float4{rows(i, col), rows(i, col + 1), rows(i, col + 2), rows(i, col + 3)});
          } else {
            cutlass::AlignedArray<float, kRun> run;
            CUTLASS_PRAGMA_UNROLL
            for (int j = 0; j < kRun; ++j) run[j] = rows(i, col + j);
            *reinterpret_cast<cutlass::AlignedArray<float, kRun>*>(out + 4 * col) = run;
          }
        }
      }
    }
  }

  /// A row's columns as above, as they are. Two neighbouring threads have 4 columns each of 8.
  template <class Row>
  CUTLASS_DEVICE static void store_vectors(bool is_there, Row const& row, float* out) {
    constexpr int kPairs = decltype(cute::size(row))::value / 2;
    bool const is_second = threadIdx.x % 2 != 0;
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < 2 * kPairs; col += 4) {
      auto const changed = [&](float of_first, float of_second) {
        return __shfl_xor_sync(0xffffffff, is_second ? of_second : of_first, 1);
      };
      float const x = changed(row(col + 2), row(col));
      float const y = changed(row(col + 3), row(col + 1));
      if (!is_there) continue;
      *reinterpret_cast<float4*>(out + 4 * col + (is_second ? 6 : 0)) =
          is_second ? float4{x, y, row(col + 2), row(col + 3)}
                    : float4{row(col), row(col + 1), x, y};
    }
  }

  /// Counts this part, and whether it is the last one.
  CUTLASS_DEVICE bool is_last(WorkParts const& parts) const {
    sm90::barrier_sync_memory(sm90::NamedBarrier::kPartStored, 0, kThreads);
    if (consumer_thread() == 0) {
      // All consumers' stores, which the barrier has put before it, are before the count; and all
      // parts' are before what the last one reads behind the next barrier.
      uint64_t* const of_item = counter(parts.first);
      uint64_t const others = count_part(of_item) - no_parts();
      bool const all = others == static_cast<uint64_t>(parts.count) - 1;
      if (all) store_relaxed(of_item, ~no_parts());
      shared_.is_last = all;
    }
    sm90::barrier_sync_memory(sm90::NamedBarrier::kPartStored, 0, kThreads);
    return shared_.is_last;
  }
  /// A counter of the call that has counted nothing.
  CUTLASS_DEVICE uint64_t no_parts() const { return results_.ticket << kCountBits; }
  CUTLASS_DEVICE static uint64_t count_part(uint64_t* counter) {
    uint64_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;"
                 : "=l"(before)
                 : "l"(counter)
                 : "memory");
    return before;
  }
  CUTLASS_DEVICE static void exchange_if_equal(uint64_t* counter, uint64_t found, uint64_t value) {
    [[maybe_unused]] uint64_t before;
    asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(counter), "l"(found), "l"(value)
                 : "memory");
  }
  CUTLASS_DEVICE static void store_relaxed(uint64_t* counter, uint64_t value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(counter), "l"(value) : "memory");
  }
  CUTLASS_DEVICE static uint64_t load_relaxed(uint64_t const* counter) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
    return value;
  }

  /// The result of all parts, always in the same order.
  CUTLASS_DEVICE void combine(Walk const& walk, WorkParts const& parts) const {
    int const warp = consumer_thread() / kLanes;
    if (PartRows::kHeads * walk.tile().rows > kWarps && parts.count <= kFewParts) {
      combine_rows<kVectorsAtOnce / kVectorsOfLane / kFewParts>(walk, parts, warp);
    } else {
      combine_rows<1>(walk, parts, warp);
    }
  }

  /// A warp's rows, kRows at a time. Its lanes know the statistics of a part each, and add up some
  /// columns each; of short rows one half of them of every other part. Whatever may be is read at a
  /// time: latency binds.
  template <int kRows>
  CUTLASS_DEVICE void combine_rows(Walk const& walk, WorkParts const& parts, int warp) const {
    constexpr int kPartsAtOnce = kVectorsAtOnce / kVectorsOfLane / kRows;  // of a lane
    constexpr int kGroup = kPartsAtOnce * kLanesOfParts;                   // of the warp
    static_assert(kRows > 0 && kPartsAtOnce > 0 && kLanes % kGroup == 0);
    int const lane = threadIdx.x % kLanes;
    int const own_part = lane / kLanesOfRow;
    int const rows = PartRows::kHeads * walk.tile().rows;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int first_row = warp; first_row < rows; first_row += kWarps * kRows) {
      // Rows behind the tile's last one are read as that one.
      auto row_of = [&](int i) {
        return PartRows::row(min(first_row + i * kWarps, rows - 1), walk.tile().rows);
      };
      RowStatistics own[kRows];
      auto read_statistics = [&](int first) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRows; ++i) {
          own[i] = {-INFINITY, 0.f};
          if (first + lane >= parts.count) continue;
          float2 const pair = __ldcg(reinterpret_cast<float2 const*>(
              results_.statistics + slot(parts, first + lane) * PartRows::kCount + row_of(i)));
          own[i] = {pair.x, pair.y};
        }
      };
      float4 read[kPartsAtOnce][kRows][kVectorsOfLane];
      auto read_parts = [&](int first) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRows; ++i) {
          // Places follow one another, but for that of part 0: an address is an instruction or
          // none.
          int64_t const place = first_slot() + parts.first + first + own_part;
          auto const* const from = reinterpret_cast<float4 const*>(
              results_.partial_out + (place * PartRows::kCount + row_of(i)) * kHeadDim);
          int64_t const before = first + own_part == 0 ? gridDim.x * kVectorsOfPart : 0;
          CUTLASS_PRAGMA_UNROLL
          for (int j = 0; j < kPartsAtOnce; ++j) {
            auto const* const of_part =
                from + (j == 0 ? before : j * kLanesOfParts * kVectorsOfPart);
            bool const is_there = first + j * kLanesOfParts + own_part < parts.count;
            CUTLASS_PRAGMA_UNROLL
            for (int k = 0; k < kVectorsOfLane; ++k) {
              read[j][i][k] = is_there ? __ldcg(of_part + lane % kLanesOfRow + k * kLanes)
                                       : float4{0.f, 0.f, 0.f, 0.f};
            }
          }
        }
      };
      int const last_lanes = (parts.count - 1) / kLanes * kLanes;
      read_statistics(last_lanes);
      read_parts(0);
      float most[kRows], sum[kRows], weight[kRows];
      float4 out[kRows][kVectorsOfLane] = {};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRows; ++i) most[i] = own[i].most, sum[i] = 0.f;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int first = last_lanes - kLanes; first >= 0; first -= kLanes) {
        read_statistics(first);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRows; ++i) most[i] = fmaxf(most[i], own[i].most);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        most[i] = of_warp(most[i], [](float a, float b) { return fmaxf(a, b); });
      }
      CUTLASS_PRAGMA_NO_UNROLL
      for (int first = 0;;) {
        if (first % kLanes == 0) {
          if (first > 0) read_statistics(first);
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kRows; ++i) {
            float const origin = most[i] == -INFINITY ? 0.f : most[i];
            weight[i] = sm90::exp2_mufu((own[i].most - origin) * scale_log2_);
            sum[i] += own[i].sum * weight[i];
          }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kPartsAtOnce; ++j) {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kRows; ++i) {
            float const of_part =
                __shfl_sync(0xffffffff, weight[i], first % kLanes + j * kLanesOfParts + own_part);
            CUTLASS_PRAGMA_UNROLL
            for (int k = 0; k < kVectorsOfLane; ++k) {
              float4 const& x = read[j][i][k];
              out[i][k].x += of_part * x.x;
              out[i][k].y += of_part * x.y;
              out[i][k].z += of_part * x.z;
              out[i][k].w += of_part * x.w;
            }
          }
        }
        first += kGroup;
        if (first >= parts.count) break;
        read_parts(first);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        sum[i] = of_warp(sum[i], [](float a, float b) { return a + b; });
        bool const is_there = first_row + i * kWarps < rows;
        store_combined(walk, row_of(i), is_there, {most[i], sum[i]}, out[i]);
      }
    }
  }

  /// A row of all parts, of which each lane has some columns.
  CUTLASS_DEVICE void store_combined(Walk const& walk, int row, bool is_there,
                                     RowStatistics const& statistics,
                                     float4 (&out)[kVectorsOfLane]) const {
    int const lane = threadIdx.x % kLanes;
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = kLanesOfRow; lanes < kLanes; lanes *= 2) {
      out[0].x += __shfl_xor_sync(0xffffffff, out[0].x, lanes);
      out[0].y += __shfl_xor_sync(0xffffffff, out[0].y, lanes);
      out[0].z += __shfl_xor_sync(0xffffffff, out[0].z, lanes);
      out[0].w += __shfl_xor_sync(0xffffffff, out[0].w, lanes);
    }
    if (!is_there) return;
    Place const place = place_of_row(walk, row);
    RowResult const result = result_of(place, statistics);
    if (lane == 0) store_lse(place, result.lse);
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kVectorsOfLane; ++k) {
      int const column = (lane + k * kLanes) * kVector;
      if (column >= call_.head_dim_v) continue;
      float4 const& x = out[k];
      cutlass::Array<float, kVector> const scaled{x.x * result.factor, x.y * result.factor,
                                                  x.z * result.factor, x.w * result.factor};
      store_rounded(scaled, out_row(place) + column);
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
