#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/traits.hpp"
#include "cute_kernels/sm90/gather.hpp"
#include "cute_kernels/sm90/opaque.hpp"
#include "cute_kernels/sm90/uniform.hpp"

namespace cute_kernels::attention {

/// The producer warpgroup: brings a part's Q, K and V to shared memory, row by row; of a cache of 8
/// bits K and V with their rows' factors. Rows that are no keys of the tile's become 0 in K and in
/// V, whatever the cache holds there, and so do their factors.
template <class Traits>
class CacheLoader {
  using Element = typename Traits::CacheElement;
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kVector = kVectorBytes / sizeof(Element);
  static constexpr int kLanesOfRow = Traits::kColumns / kVector;
  static constexpr int kRowsAtOnce = kLanes / kLanesOfRow;  // of a warp
  static constexpr int kRowsOfWarp = Traits::kTileN / kWarps;
  static constexpr int kBlocksAtOnce = kLanes / kRowsOfWarp;
  static constexpr int kTurnsAhead =
      Traits::kLookAhead > kBlocksAtOnce ? Traits::kLookAhead / kBlocksAtOnce : 1;
  static_assert(kRowsOfWarp % kRowsAtOnce == 0 && kLanes % kRowsOfWarp == 0);
  // Blocks that come before a part's queries are not read until these are there: all of them have
  // a stage, or the producer would wait for one, and consumers for the queries behind it.
  static constexpr bool kQueriesMayBeLate = kTurnsAhead * kBlocksAtOnce <= Traits::kStages;
  using Stage = RingStage<Traits::kStages>;

 public:
  CUTLASS_DEVICE CacheLoader(CachedCall const& call, CacheSource const& source,
                             typename Traits::Format const& format, SharedStorage& shared)
      : call_(call), source_(source), format_(format), shared_(shared) {}

  /// Issues every load of one part. Rows are found of as many blocks at a time as have one for each
  /// lane of a warp.
  CUTLASS_DEVICE void load(Walk const& walk) {
    int const begin = walk.begin_block(), end = walk.end_block();
    if (begin == end) return;
    Stage stage = Stage::of(passed_);
    int block = begin;
    int const head = walk.head() * Traits::kHeads;
    bool const alike = have_same_places(source_.k, source_.v);
    auto const find = [&](int turn) { return key_row(walk, begin + turn * kBlocksAtOnce); };
    auto const copy = [&](FoundRow const& row) {
      uint32_t const of_keys = row_place<kVector>(row, source_.k, head);
      uint32_t const of_values = alike ? of_keys : row_place<kVector>(row, source_.v, head);
      [[maybe_unused]] Factor key_factor, value_factor;
      if constexpr (Traits::kEightBits) {
        key_factor = factor_of(format_.k_of_row, row, head);
        value_factor = factor_of(format_.v_of_row, row, head);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBlocksAtOnce; ++i) {
        if (i > 0 && block == end) break;
        // Known to be the same in all lanes, or each arrival would be a loop over addresses.
        int const at = sm90::uniform(stage.index);
        auto places = places_of_keys(of_keys, i);
        shared_.k_empty[at].wait(stage.phase ^ 1);
        copy_keys(shared_.k, at, source_.k, call_.head_dim, places);
        if constexpr (Traits::kEightBits) {
          copy_factors(shared_.key_factors[at], key_factor, i);
        }
        sm90::arrive_when_gathered(shared_.k_full[at]);
        if (!alike) places = places_of_keys(of_values, i);
        shared_.v_empty[at].wait(stage.phase ^ 1);
        copy_keys(shared_.v, at, source_.v, call_.head_dim_v, places);
        if constexpr (Traits::kEightBits) {
          copy_factors(shared_.value_factors[at], value_factor, i);
        }
        sm90::arrive_when_gathered(shared_.v_full[at]);
        stage.advance();
        ++block;
      }
    };
    auto const prepare = [&] {
      if constexpr (!Traits::kEightBits) load_queries(walk);
    };
    int const turns = (end - begin + kBlocksAtOnce - 1) / kBlocksAtOnce;
    // Queries wait until the part before has its last scores. Until then memory would be idle: but
    // for the first part, whose queries wait for nothing, some blocks go before them.
    bool const queries_late = kQueriesMayBeLate && passed_ > 0;
    copy_blocks<kTurnsAhead>(0, turns, source_.pages.pages, find, queries_late, prepare, copy);
    passed_ += end - begin;
  }

  /// Rows behind a tile's last one are never copied: they are 0, or of a tile before. By all
  /// threads, before anything else.
  CUTLASS_DEVICE static void clear_queries(SharedStorage& shared) {
    auto* const pieces = reinterpret_cast<uint4*>(&shared.q);
    constexpr int kPieces = sizeof(shared.q) / sizeof(uint4);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPieces; i += Traits::kThreads) {
      if (i + threadIdx.x < kPieces) pieces[i + threadIdx.x] = {0, 0, 0, 0};
    }
  }

  /// Every load is issued.
  CUTLASS_DEVICE static void finish() {}
  /// Shared memory must outlive all copies.
  CUTLASS_DEVICE static void drain() { sm90::wait_until_gathered(); }

 private:
  CUTLASS_DEVICE static int lane(uint32_t thread = threadIdx.x) { return thread % kLanes; }
  CUTLASS_DEVICE static int warp(uint32_t thread = threadIdx.x) { return thread / kLanes % kWarps; }

  /// Rows of a tile go round the warps, kRowsAtOnce at a time: so a thread's place within a row of
  /// the swizzle's period is the same in most of its rows.
  CUTLASS_DEVICE static int row_of(int pass, int part, uint32_t thread = threadIdx.x) {
    return (pass * kWarps + warp(thread)) * kRowsAtOnce + part;
  }
  /// The one that this lane finds for its warp, of those that the tile has or behind them.
  CUTLASS_DEVICE static int found_row(uint32_t thread) {
    return row_of(lane(thread) / kRowsAtOnce, lane(thread) % kRowsAtOnce, thread);
  }
  /// The same of keys, of one of several blocks.
  CUTLASS_DEVICE static int found_block() { return lane() / kRowsOfWarp; }
  CUTLASS_DEVICE static int found_key() {
    return row_of(lane() % kRowsOfWarp / kRowsAtOnce, lane() % kRowsAtOnce);
  }

  /// Of the blocks from `block` on.
  CUTLASS_DEVICE FoundRow key_row(Walk const& walk, int block) const {
    KeySpan const keys = walk.tile().keys;
    int const key = keys.begin + (block + found_block()) * Traits::kTileN + found_key();
    return key < keys.end ? row_of_key(source_, walk.entry(), key) : FoundRow{-1, 0};
  }

  CUTLASS_DEVICE void load_queries(Walk const& walk) {
    shared_.q_empty.wait(q_phase_ ^ 1);
    uint32_t const thread = sm90::opaque(threadIdx.x);  // nothing is kept from part to part
    int const group = walk.sequence().group;
    int const found_row = CacheLoader::found_row(thread);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kConsumers / Traits::kHeads; ++i) {
      int const number = i * Traits::kWarpgroupM + found_row;
      int const rows = walk.tile().rows - i * Traits::kWarpgroupM;
      if (rows <= 0) break;
      FoundRow row{-1, 0};
      if (found_row < Traits::kWarpgroupM && number < walk.tile().rows) {
        source_.group(row.major, row.minor, walk.tile().first_row + number);
        row.major += walk.sequence().row_q;
        row.minor += walk.head() * Traits::kHeads * group;
      }
      copy_rows<Traits::kWarpgroupM>(shared_.q[i].data(), typename Traits::LayoutQueries{},
                                     source_.q.data, call_.head_dim, group * source_.q.head_stride,
                                     places_of<Traits::kWarpgroupM>(row_place<kVector>(
                                         row, source_.q.seqlen_stride, source_.q.head_stride)),
                                     rows, thread);
    }
    sm90::arrive_when_gathered(shared_.q_full);
    q_phase_ ^= 1;
  }

  /// Of rows of a tile.
  template <int kRows>
  static constexpr int kPasses = kRows / (kWarps * kRowsAtOnce);
  /// Of a thread's rows of a tile.
  template <int kRows>
  using Places = cutlass::Array<uint32_t, kPasses<kRows>>;

  /// What the lanes from `first` on have found.
  template <int kRows>
  CUTLASS_DEVICE static Places<kRows> places_of(uint32_t found, int first = 0) {
    static_assert(kPasses<kRows> * kRowsAtOnce <= kLanes, "a lane finds one row");
    return found_by_lanes<kPasses<kRows>>(found, first + lane() / kLanesOfRow, kRowsAtOnce);
  }
  CUTLASS_DEVICE static Places<Traits::kTileN> places_of_keys(uint32_t found, int block) {
    return places_of<Traits::kTileN>(found, block * kRowsOfWarp);
  }

  template <class Stages>
  CUTLASS_DEVICE void copy_keys(Stages& stages, int stage, CacheView const& view, int columns,
                                Places<Traits::kTileN> const& places) const {
    copy_rows<Traits::kTileN>(stages.data() + stage * Traits::kStageElements,
                              typename Traits::LayoutStage{}, view.data, columns, view.head_stride,
                              places);
  }

  /// Where the factor of the row that a lane has found is, if there is such a row; null: rows have
  /// no factors.
  struct Factor {
    float const* from;
    bool there;
  };
  template <class View>
  CUTLASS_DEVICE static Factor factor_of(View const& view, FoundRow const& found, int head) {
    // Strides have 32 bits, which the host has checked.
    auto const times = [](int index, int64_t stride, uint64_t behind) {
      return sm90::multiply_add(index, static_cast<uint32_t>(stride), behind);
    };
    uint64_t const of_head = times(head, view.head_stride, 0);
    uint64_t const offset =
        times(found.major, view.page_stride, times(found.minor, view.slot_stride, of_head));
    return {view.data == nullptr ? nullptr : view.data + offset, found.major >= 0};
  }

  /// Of the rows of one of the blocks.
  template <class Factors>
  CUTLASS_DEVICE static void copy_factors(Factors& factors, Factor const& factor, int block) {
    bool const is_own = factor.from != nullptr && found_block() == block;
    sm90::gather_or_clear_float_if(is_own, &factors[found_key()], factor.from, factor.there);
  }

  /// Copies the rows of a tile, but for passes behind row `rows`. Columns of a head from `columns`
  /// on are 0; from one head of the tile's to the next are `head_stride` elements.
  template <int kRows, class SwizzledLayout>
  CUTLASS_DEVICE static void copy_rows(Element* shared, SwizzledLayout const& swizzled,
                                       void const* global, int columns, int64_t head_stride,
                                       Places<kRows> const& from, int rows = kRows,
                                       uint32_t thread = threadIdx.x) {
    int const part = lane(thread) / kLanesOfRow;
    int const column = lane(thread) % kLanesOfRow * kVector;
    int const of_head = column % Traits::kHeadDim;
    // The swizzle's period is 8 rows: a thread's places repeat after as many passes, further on.
    constexpr int kPeriod = kRowsAtOnce * kWarps < 8 ? 8 / (kRowsAtOnce * kWarps) : 1;
    constexpr int kPeriodBytes = kPeriod * kRowsAtOnce * kWarps * Traits::kSwizzleBytes;
    auto const layout = cute::as_position_independent_swizzle_layout(swizzled);
    bool const has_column = of_head < columns;
    int64_t const offset = column / Traits::kHeadDim * head_stride + of_head;
    auto const first = reinterpret_cast<uint64_t>(global) + offset * sizeof(Element);
    uint32_t places[kPeriod];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPeriod; ++i) {
      places[i] = cute::cast_smem_ptr_to_uint(shared) +
                  layout(row_of(i, part, thread), column) * static_cast<int>(sizeof(Element));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int pass = 0; pass < kPasses<kRows>; ++pass) {
      if (pass * kWarps * kRowsAtOnce >= rows) break;
      bool const there = from[pass] != kNowhere && has_column;
      uint32_t const to = places[pass % kPeriod] + pass / kPeriod * kPeriodBytes;
      sm90::gather_or_clear(to, vector_at(first, from[pass]), there);
    }
  }

  CachedCall const& call_;
  CacheSource const& source_;
  typename Traits::Format const& format_;
  SharedStorage& shared_;
  uint32_t passed_ = 0;  // blocks of the parts so far
  uint32_t q_phase_ = 0;
};

}  // namespace cute_kernels::attention
