#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/traits.hpp"
#include "cute_kernels/sm90/gather.hpp"

namespace cute_kernels::attention {

/// The producer warpgroup: brings a part's Q, K and V to shared memory, row by row. Rows that are
/// no keys of the tile's become 0 in K and in V, whatever the cache holds there.
template <class Traits>
class CacheLoader {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kVectorBytes = 16;
  static constexpr int kVector = kVectorBytes / sizeof(Element);
  static constexpr int kLanesOfRow = Traits::kHeadDim / kVector;
  static constexpr int kRowsAtOnce = kLanes / kLanesOfRow;  // of a warp

 public:
  CUTLASS_DEVICE CacheLoader(CachedCall const& call, CacheSource const& source,
                             SharedStorage& shared)
      : call_(call), source_(source), shared_(shared) {}

  /// Issues every load of one part.
  CUTLASS_DEVICE void load(Walk const& walk) {
    if (walk.begin_block() == walk.end_block()) return;
    auto const find = [&](int block) { return key_row(walk, block); };
    auto const copy = [&](FoundRow const& row) {
      auto const keys = offsets_of<Traits::kTileN>(row, source_.k);
      shared_.k_empty[stage_.index].wait(stage_.phase ^ 1);
      copy_keys(shared_.k, source_.k, walk.head(), call_.head_dim, keys);
      sm90::arrive_when_gathered(shared_.k_full[stage_.index]);
      auto const values = offsets_of<Traits::kTileN>(row, source_.v);
      shared_.v_empty[stage_.index].wait(stage_.phase ^ 1);
      copy_keys(shared_.v, source_.v, walk.head(), call_.head_dim_v, values);
      sm90::arrive_when_gathered(shared_.v_full[stage_.index]);
      stage_.advance();
    };
    copy_blocks<Traits::kLookAhead>(
        walk.begin_block(), walk.end_block(), source_.pages.pages, find,
        [&] { load_queries(walk); }, copy);
  }

  /// Shared memory must outlive all copies.
  CUTLASS_DEVICE static void drain() { sm90::wait_until_gathered(); }

 private:
  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int warp() { return threadIdx.x / kLanes % kWarps; }

  /// Rows of a tile go round the warps, kRowsAtOnce at a time: so a thread's place within a row of
  /// the swizzle's period is the same in most of its rows.
  CUTLASS_DEVICE static int row_of(int pass, int part) {
    return (pass * kWarps + warp()) * kRowsAtOnce + part;
  }
  /// The one that this lane finds for its warp, of those that the tile has or behind them.
  CUTLASS_DEVICE static int found_row() {
    return row_of(lane() / kRowsAtOnce, lane() % kRowsAtOnce);
  }

  CUTLASS_DEVICE FoundRow key_row(Walk const& walk, int block) const {
    KeySpan const keys = walk.tile().keys;
    int const key = keys.begin + block * Traits::kTileN + found_row();
    bool const there = found_row() < Traits::kTileN && key < keys.end;
    return there ? row_of_key(source_, walk.entry(), key) : FoundRow{-1, 0};
  }

  CUTLASS_DEVICE void load_queries(Walk const& walk) {
    shared_.q_empty.wait(q_phase_ ^ 1);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kConsumers; ++i) {
      int const number = i * Traits::kWarpgroupM + found_row();
      if (i * Traits::kWarpgroupM >= walk.tile().rows) break;
      FoundRow row{-1, 0};
      if (found_row() < Traits::kWarpgroupM && number < walk.tile().rows) {
        source_.group(row.major, row.minor, walk.tile().first_row + number);
        row.major += walk.sequence().row_q;
        row.minor += walk.head() * walk.sequence().group;
      }
      copy_rows<Traits::kWarpgroupM>(
          shared_.q[i].data(), typename Traits::LayoutQ{},
          static_cast<Element const*>(source_.q.data), call_.head_dim,
          offsets_of<Traits::kWarpgroupM>(row, source_.q.seqlen_stride, source_.q.head_stride));
    }
    sm90::arrive_when_gathered(shared_.q_full);
    q_phase_ ^= 1;
  }

  /// Of rows of a tile.
  template <int kRows>
  static constexpr int kPasses = kRows / (kWarps * kRowsAtOnce);
  /// Where a thread's rows of a tile begin, in vectors, or kNowhere.
  template <int kRows>
  using Offsets = cutlass::Array<uint32_t, kPasses<kRows>>;

  template <int kRows>
  CUTLASS_DEVICE static Offsets<kRows> offsets_of(FoundRow const& found, int64_t major_stride,
                                                  int64_t minor_stride) {
    static_assert(kPasses<kRows> * kRowsAtOnce <= kLanes, "a lane finds one row");
    int64_t const offset = found.major * major_stride + found.minor * minor_stride;
    uint32_t const vectors = found.major < 0 ? kNowhere : static_cast<uint32_t>(offset / kVector);
    return found_by_lanes<kPasses<kRows>>(vectors, lane() / kLanesOfRow, kRowsAtOnce);
  }
  template <int kRows>
  CUTLASS_DEVICE static Offsets<kRows> offsets_of(FoundRow const& found, CacheView const& view) {
    return offsets_of<kRows>(found, view.page_stride, view.slot_stride);
  }

  template <class Stages>
  CUTLASS_DEVICE void copy_keys(Stages& stages, CacheView const& view, int head, int columns,
                                Offsets<Traits::kTileN> const& rows) const {
    copy_rows<Traits::kTileN>(
        stages.data() + stage_.index * Traits::kStageElements, typename Traits::LayoutRows{},
        static_cast<Element const*>(view.data) + head * view.head_stride, columns, rows);
  }

  /// Copies the rows of a tile. Columns from `columns` on are 0.
  template <int kRows, class SwizzledLayout>
  CUTLASS_DEVICE static void copy_rows(Element* shared, SwizzledLayout const& swizzled,
                                       Element const* global, int columns,
                                       Offsets<kRows> const& rows) {
    int const part = lane() / kLanesOfRow;
    int const column = lane() % kLanesOfRow * kVector;
    // The swizzle's period is 8 rows: a thread's places repeat after as many passes, further on.
    constexpr int kPeriod = kRowsAtOnce * kWarps < 8 ? 8 / (kRowsAtOnce * kWarps) : 1;
    constexpr int kPeriodBytes = kPeriod * kRowsAtOnce * kWarps * Traits::kSwizzleBytes;
    auto const layout = cute::as_position_independent_swizzle_layout(swizzled);
    bool const has_column = column < columns;
    auto const* const from = reinterpret_cast<char const*>(global + (has_column ? column : 0));
    uint32_t places[kPeriod];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPeriod; ++i) {
      places[i] = cute::cast_smem_ptr_to_uint(shared) +
                  layout(row_of(i, part), column) * static_cast<int>(sizeof(Element));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int pass = 0; pass < kPasses<kRows>; ++pass) {
      bool const there = rows[pass] != kNowhere && has_column;
      uint32_t const to = places[pass % kPeriod] + pass / kPeriod * kPeriodBytes;
      uint32_t const row = there ? rows[pass] : 0;
      sm90::gather_or_clear(to, from + uint64_t{row} * kVectorBytes, there);
    }
  }

  CachedCall const& call_;
  CacheSource const& source_;
  SharedStorage& shared_;
  RingStage<Traits::kStages> stage_;
  uint32_t q_phase_ = 0;
};

}  // namespace cute_kernels::attention
