#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/fp8_convert.hpp"
#include "cute_kernels/attention/decode/fp8_wide_traits.hpp"
#include "cute_kernels/sm90/gather.hpp"

namespace cute_kernels::attention {

/// The producer warpgroup of a cache of 8 bits: copies rows of K and V to shared memory as they
/// are, kStaged blocks ahead, whatever part they are of, and what has landed it makes float16 where
/// WGMMA reads it. A thread converts what it has copied itself: no other one waits for its copies.
/// Rows that are no keys of the tile's become 0, and so do their factors.
template <class Traits>
class Fp8WideLoader {
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kVector = Traits::kPieceBytes;
  static_assert(kVector == kVectorBytes);
  static constexpr int kLanesOfRow = Traits::kHeadDim / kVector;
  static constexpr int kRowsAtOnce = kLanes / kLanesOfRow;  // of a warp
  static constexpr int kPieces = Traits::kPieces;
  static constexpr int kStaged = Traits::kStaged;
  // The rows of a thread's pieces are multiples of the swizzle's period of 8 rows apart.
  static constexpr int kBytesToNextPiece = kRowsAtOnce * kWarps * Traits::kSwizzleBytes;
  static_assert(kRowsAtOnce * kWarps % 8 == 0 && kPieces * kRowsAtOnce <= kLanes);

 public:
  CUTLASS_DEVICE Fp8WideLoader(CachedCall const& call, CacheSource const& source,
                               EightBits const& format, SharedStorage& shared)
      : call_(call), source_(source), format_(format), shared_(shared) {}

  /// Starts the copies of one part, and converts what has landed of what came before.
  CUTLASS_DEVICE void load(Walk const& walk) {
    if (walk.begin_block() == walk.end_block()) return;
    auto const find = [&](int block) { return key_row(walk, block); };
    auto const copy = [&](FoundRow const& row) {
      if (staged_ == kStaged) convert_oldest();
      stage(walk.head(), row);
    };
    copy_blocks<Traits::kLookAhead>(
        walk.begin_block(), walk.end_block(), source_.pages.pages, find, false, [] {}, copy);
  }

  /// Converts the rest.
  CUTLASS_DEVICE void finish() {
    auto stage_nothing = [] {
      cute::cp_async_fence();
      cute::cp_async_fence();
    };
    for (int i = staged_; i < kStaged; ++i) stage_nothing();
    CUTLASS_PRAGMA_NO_UNROLL
    while (staged_ > 0) {
      convert_oldest();
      stage_nothing();
    }
  }

  /// What is converted has landed.
  CUTLASS_DEVICE static void drain() {}

 private:
  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int warp() { return threadIdx.x / kLanes % kWarps; }

  /// Rows of a block go round the warps, kRowsAtOnce at a time.
  CUTLASS_DEVICE static int row_of(int piece, int part) {
    return (piece * kWarps + warp()) * kRowsAtOnce + part;
  }
  /// The one that this lane finds for its warp, of those that the block has or behind them.
  CUTLASS_DEVICE static int found_row() {
    return row_of(lane() / kRowsAtOnce, lane() % kRowsAtOnce);
  }
  CUTLASS_DEVICE static int part() { return lane() / kLanesOfRow; }
  CUTLASS_DEVICE static int column() { return lane() % kLanesOfRow * kVector; }

  CUTLASS_DEVICE FoundRow key_row(Walk const& walk, int block) const {
    KeySpan const keys = walk.tile().keys;
    int const key = keys.begin + block * Traits::kTileN + found_row();
    bool const there = found_row() < Traits::kTileN && key < keys.end;
    return there ? row_of_key(source_, walk.entry(), key) : FoundRow{-1, 0};
  }

  /// Two groups of copies: the block's K with all factors, and its V.
  CUTLASS_DEVICE void stage(int head, FoundRow const& row) {
    auto& staged = shared_.staged[next_];
    auto const places_in = [&](CacheView const& view) {
      return found_by_lanes<kPieces>(row_place<kVector>(row, view, head), part(), kRowsAtOnce);
    };
    auto places = places_in(source_.k);
    copy(staged[0], source_.k, call_.head_dim, places);
    copy_factors(0, format_.k_of_row, head, row);
    copy_factors(1, format_.v_of_row, head, row);
    cute::cp_async_fence();
    if (!have_same_places(source_.k, source_.v)) places = places_in(source_.v);
    copy(staged[1], source_.v, call_.head_dim_v, places);
    cute::cp_async_fence();
    if (++next_ == kStaged) next_ = 0;
    ++staged_;
  }

  CUTLASS_DEVICE void copy(uint4 (&staged)[kPieces][Traits::kProducerThreads],
                           CacheView const& view, int columns,
                           cutlass::Array<uint32_t, kPieces> const& places) const {
    auto const first = reinterpret_cast<uint64_t>(view.data) + column();
    bool const has_column = column() < columns;
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      bool const there = places[piece] != kNowhere && has_column;
      sm90::gather_or_clear(cute::cast_smem_ptr_to_uint(&staged[piece][threadIdx.x]),
                            vector_at(first, places[piece]), there);
    }
  }

  CUTLASS_DEVICE void copy_factors(int of_values, FactorView const& view, int head,
                                   FoundRow const& found) const {
    if (view.data == nullptr || found_row() >= Traits::kTileN) return;
    bool const there = found.major >= 0;
    int64_t const offset = found.major * view.page_stride + found.minor * view.slot_stride;
    sm90::gather_or_clear_float(&shared_.staged_factors[next_][of_values][found_row()],
                                view.data + (there ? offset + head * view.head_stride : 0), there);
  }

  /// Consumers put the fence between these writes and WGMMA's reads, behind the barrier: a fence
  /// here might wait for copies.
  CUTLASS_DEVICE void convert_oldest() {
    auto const& staged = shared_.staged[oldest_];
    int const stage = stage_.index;
    // All groups but the oldest block's K, then but its V, may be on their way.
    shared_.k_empty[stage].wait(stage_.phase ^ 1);
    cute::cp_async_wait<2 * kStaged - 1>();
    move_factors(0, format_.k_of_row, shared_.key_factors[stage]);
    convert(staged[0], shared_.k.data() + stage * Traits::kStageElements);
    shared_.k_full[stage].arrive();
    shared_.v_empty[stage].wait(stage_.phase ^ 1);
    cute::cp_async_wait<2 * kStaged - 2>();
    move_factors(1, format_.v_of_row, shared_.value_factors[stage]);
    convert(staged[1], shared_.v.data() + stage * Traits::kStageElements);
    shared_.v_full[stage].arrive();
    stage_.advance();
    if (++oldest_ == kStaged) oldest_ = 0;
    --staged_;
  }

  CUTLASS_DEVICE void move_factors(int of_values, FactorView const& view,
                                   float (&factors)[Traits::kTileN]) const {
    if (view.data == nullptr || found_row() >= Traits::kTileN) return;
    factors[found_row()] = shared_.staged_factors[oldest_][of_values][found_row()];
  }

  CUTLASS_DEVICE void convert(uint4 const (&staged)[kPieces][Traits::kProducerThreads],
                              cutlass::half_t* to) const {
    format_.is_int8 ? convert_as<true>(staged, to) : convert_as<false>(staged, to);
  }

  /// A piece is two runs of 16 bytes then. Where a row has eight lanes or more, half of them would
  /// meet the other half in the same banks: those write their second run first.
  template <bool kInt8>
  CUTLASS_DEVICE static void convert_as(uint4 const (&staged)[kPieces][Traits::kProducerThreads],
                                        cutlass::half_t* to) {
    bool const second_first = kLanesOfRow >= 8 && lane() / 4 % 2 == 1;
    auto const layout = cute::as_position_independent_swizzle_layout(typename Traits::LayoutRows{});
    auto place = [&](bool second) {
      int const offset = layout(row_of(0, part()), column() + (second ? kVector / 2 : 0));
      return reinterpret_cast<char*>(to + offset);
    };
    char* const first_to = place(second_first);
    char* const second_to = place(!second_first);
    uint4 bytes[kPieces];
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) bytes[piece] = staged[piece][threadIdx.x];
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      uint4 const& x = bytes[piece];
      uint2 const low{x.x, x.y}, high{x.z, x.w};
      int const further = piece * kBytesToNextPiece;
      *reinterpret_cast<uint4*>(first_to + further) =
          halves_of_run<kInt8>(second_first ? high : low);
      *reinterpret_cast<uint4*>(second_to + further) =
          halves_of_run<kInt8>(second_first ? low : high);
    }
  }

  CachedCall const& call_;
  CacheSource const& source_;
  EightBits const& format_;
  SharedStorage& shared_;
  RingStage<Traits::kStages> stage_;
  int next_ = 0;    // of the staged blocks, to be written
  int oldest_ = 0;  // and to be read
  int staged_ = 0;  // how many there are
};

}  // namespace cute_kernels::attention
