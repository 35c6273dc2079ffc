#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/fp8_convert.hpp"
#include "cute_kernels/attention/decode/fp8_wide_traits.hpp"
#include "cute_kernels/sm90/gather.hpp"
#include "cute_kernels/sm90/mbarrier.hpp"

namespace cute_kernels::attention {

/// A producer warpgroup of a cache of 8 bits, that of K or, if kOfValues, that of V: copies rows to
/// shared memory as they are, kStaged slots ahead, whatever part they are of, and what has landed
/// it makes float16 where WGMMA reads it. A thread converts what it has copied itself: no other one
/// waits for its copies. The two warpgroups know nothing of each other: each has barriers and
/// memory of its own, and comes to all stages in their order. Rows that are no keys of the tile's
/// become 0, and so do their factors.
template <class Traits, bool kOfValues>
class Fp8WideLoader {
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kVector = Traits::kPieceBytes;
  static_assert(kVector == kVectorBytes);
  static constexpr int kLanesOfRow = Traits::kHeadDim / kVector;
  static constexpr int kRowsAtOnce = kLanes / kLanesOfRow;  // of a warp
  static constexpr int kFours = kLanesOfRow / 4;
  static constexpr int kPieces = Traits::kPieces;
  static constexpr int kPiecesOfSlot = Traits::kPiecesOfSlot;
  static constexpr int kSlots = kPieces / kPiecesOfSlot;  // of a block
  static constexpr int kStaged = Traits::kStaged;
  // The rows of a thread's pieces are multiples of the swizzle's period of 8 rows apart.
  static constexpr int kBytesToNextPiece = kRowsAtOnce * kWarps * Traits::kSwizzleBytes;
  static constexpr int kElementsToNextPiece = kBytesToNextPiece / sizeof(cutlass::half_t);
  static_assert(kRowsAtOnce * kWarps % 8 == 0 && kPieces * kRowsAtOnce <= kLanes);

 public:
  CUTLASS_DEVICE Fp8WideLoader(CachedCall const& call, CacheSource const& source,
                               EightBits const& format, SharedStorage& shared)
      : call_(call), source_(source), format_(format), shared_(shared) {}

  /// Starts the copies of one part, and converts what has landed of what came before.
  CUTLASS_DEVICE void load(Walk const& walk) {
    find_and_copy(source_, walk, [&](FoundRow const& row, int head) { copy(row, head); });
  }
  /// copy(row, head) for each block of a part, with the row that this lane has found.
  template <class Copy>
  CUTLASS_DEVICE static void find_and_copy(CacheSource const& source, Walk const& walk,
                                           Copy const& copy) {
    int const begin = walk.begin_block(), end = walk.end_block();
    if (begin == end) return;
    // Copies: a walk is in shared memory.
    KeySpan const keys = walk.tile().keys;
    int const entry = walk.entry(), head = walk.head();
    int const own = keys.begin + found_row();
    auto const find = [&](int block) {
      int const key = own + block * Traits::kTileN;
      bool const there = found_row() < Traits::kTileN && key < keys.end;
      return there ? row_of_key(source, entry, key) : FoundRow{-1, 0};
    };
    copy_blocks<Traits::kLookAhead>(
        begin, end, source.pages.pages, find, false, [] {},
        [&](FoundRow const& row) { copy(row, head); });
  }

  /// Starts the copies of a block, and converts the oldest slots where there is no room for it.
  CUTLASS_DEVICE void copy(FoundRow const& row, int head) {
    uint32_t const place = row_place<kVector>(row, view(), head);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      if (staged_ == kStaged) convert_oldest();
      copy_rows(place, slot);
      if (slot == 0) copy_factors(head, row);
      cute::cp_async_fence();
      next_ = behind(next_);
      ++staged_;
    }
  }

  /// Converts the rest.
  CUTLASS_DEVICE void finish() {
    fill_groups();
    CUTLASS_PRAGMA_NO_UNROLL
    while (has_staged()) convert_next();
  }
  CUTLASS_DEVICE bool has_staged() const { return staged_ > 0; }
  /// As if as many blocks were on their way as can be.
  CUTLASS_DEVICE void fill_groups() const {
    for (int i = staged_; i < kStaged; ++i) cute::cp_async_fence();
  }
  CUTLASS_DEVICE void convert_next() {
    convert_oldest();
    cute::cp_async_fence();
  }

  /// What is converted has landed.
  CUTLASS_DEVICE static void drain() {}

 private:
  using Slot = uint4[kPiecesOfSlot][Traits::kProducerThreads];

  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int warp() { return threadIdx.x / kLanes % kWarps; }
  CUTLASS_DEVICE static int thread() { return threadIdx.x % Traits::kProducerThreads; }

  // What of a call is this warpgroup's.
  CUTLASS_DEVICE CacheView const& view() const { return kOfValues ? source_.v : source_.k; }
  CUTLASS_DEVICE int columns() const { return kOfValues ? call_.head_dim_v : call_.head_dim; }
  CUTLASS_DEVICE FactorView const& factors() const {
    return kOfValues ? format_.v_of_row : format_.k_of_row;
  }
  CUTLASS_DEVICE auto& full() const { return kOfValues ? shared_.v_full : shared_.k_full; }
  CUTLASS_DEVICE auto& empty() const { return kOfValues ? shared_.v_empty : shared_.k_empty; }
  CUTLASS_DEVICE cutlass::half_t* stages() const {
    return kOfValues ? shared_.v.data() : shared_.k.data();
  }
  CUTLASS_DEVICE Slot& staged(int slot) const { return shared_.staged[kOfValues][slot]; }
  CUTLASS_DEVICE float& staged_factor(int slot) const {
    return shared_.staged_factors[kOfValues][slot][found_row()];
  }
  CUTLASS_DEVICE float& factor_in_stage(int stage) const {
    return (kOfValues ? shared_.value_factors : shared_.key_factors)[stage][found_row()];
  }
  CUTLASS_DEVICE bool finds_factor() const {
    return factors().data != nullptr && found_row() < Traits::kTileN;
  }

  /// Rows of a block go round the warps, kRowsAtOnce at a time.
  CUTLASS_DEVICE static int row_of(int piece, int part) {
    return (piece * kWarps + warp()) * kRowsAtOnce + part;
  }
  /// The one that this lane finds for its warp, of those that the block has or behind them.
  CUTLASS_DEVICE static int found_row() {
    return row_of(lane() / kRowsAtOnce, lane() % kRowsAtOnce);
  }
  /// Of a row's pieces four lanes that follow one another have four, and so their stores 64 bytes
  /// of every other 16. The next four have those of the next row, which the swizzle puts between
  /// them: eight lanes meet in no bank.
  CUTLASS_DEVICE static int part() {
    int const pair = lane() / 8;
    return pair / kFours * 2 + lane() / 4 % 2;
  }
  CUTLASS_DEVICE static int column() { return (lane() / 8 % kFours * 4 + lane() % 4) * kVector; }
  CUTLASS_DEVICE static int behind(int slot) { return slot + 1 == kStaged ? 0 : slot + 1; }

  /// Number `slot` of a block's.
  CUTLASS_DEVICE void copy_rows(uint32_t found, int slot) const {
    auto const places = found_by_lanes<kPiecesOfSlot>(
        found, part() + slot * kPiecesOfSlot * kRowsAtOnce, kRowsAtOnce);
    auto const first = reinterpret_cast<uint64_t>(view().data) + column();
    bool const has_column = column() < columns();
    uint32_t const to = cute::cast_smem_ptr_to_uint(&staged(next_)[0][thread()]);
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < kPiecesOfSlot; ++piece) {
      bool const there = places[piece] != kNowhere && has_column;
      sm90::gather_or_clear(to + piece * Traits::kProducerThreads * kVector,
                            vector_at(first, places[piece]), there);
    }
  }

  CUTLASS_DEVICE void copy_factors(int head, FoundRow const& found) const {
    if (!finds_factor()) return;
    FactorView const& view = factors();
    bool const there = found.major >= 0;
    int64_t const offset = found.major * view.page_stride + found.minor * view.slot_stride;
    sm90::gather_or_clear_float(&staged_factor(next_),
                                view.data + (there ? offset + head * view.head_stride : 0), there);
  }

  /// Consumers put the fence between these writes and WGMMA's reads, behind the barrier: a fence
  /// here might wait for copies.
  CUTLASS_DEVICE void convert_oldest() {
    // Of one warpgroup K and V take turns.
    static_assert(Traits::kProducers == 2 || kSlots == 1);
    sm90::wait_until_gathered_but<(Traits::kProducers == 1 ? 2 : 1) * kStaged - 1>();
    uint4 bytes[kPiecesOfSlot];
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < kPiecesOfSlot; ++piece) {
      bytes[piece] = staged(oldest_)[piece][thread()];
    }
    bool const moves_factor = oldest_of_block_ == 0 && finds_factor();
    float const factor = moves_factor ? staged_factor(oldest_) : 0.f;
    int const stage = stage_.index;
    if (oldest_of_block_ == 0) sm90::wait_memory(empty()[stage], stage_.phase ^ 1);
    if (moves_factor) factor_in_stage(stage) = factor;
    auto* const to = stages() + stage * Traits::kStageElements +
                     oldest_of_block_ * kPiecesOfSlot * kElementsToNextPiece;
    format_.is_int8 ? convert<true>(bytes, to) : convert<false>(bytes, to);
    oldest_ = behind(oldest_);
    --staged_;
    if (kSlots > 1 && ++oldest_of_block_ < kSlots) return;
    // A barrier's arrival of a warp: one for what all of its lanes have written.
    __syncwarp();
    if (lane() == 0) full()[stage].arrive();
    stage_.advance();
    oldest_of_block_ = 0;
  }

  /// A piece is two runs of 16 bytes then, neighbours but for the swizzle.
  template <bool kInt8>
  CUTLASS_DEVICE static void convert(uint4 const (&bytes)[kPiecesOfSlot], cutlass::half_t* to) {
    auto const layout = cute::as_position_independent_swizzle_layout(typename Traits::LayoutRows{});
    auto place = [&](int column) {
      return reinterpret_cast<char*>(to + layout(row_of(0, part()), column));
    };
    char* const first_to = place(column());
    char* const second_to = place(column() + kVector / 2);
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < kPiecesOfSlot; ++piece) {
      uint4 const& x = bytes[piece];
      int const further = piece * kBytesToNextPiece;
      *reinterpret_cast<uint4*>(first_to + further) = halves_of_run<kInt8>({x.x, x.y});
      *reinterpret_cast<uint4*>(second_to + further) = halves_of_run<kInt8>({x.z, x.w});
    }
  }

  CachedCall const& call_;
  CacheSource const& source_;
  EightBits const& format_;
  SharedStorage& shared_;
  RingStage<Traits::kStages> stage_;
  int oldest_of_block_ = 0;  // which of its block's slots the oldest one is
  int next_ = 0;             // of the staged slots, to be written
  int oldest_ = 0;           // and to be read
  int staged_ = 0;           // how many there are
};

/// The one producer warpgroup of K and of V.
template <class Traits>
class Fp8WidePairLoader {
  using Keys = Fp8WideLoader<Traits, false>;
  using Values = Fp8WideLoader<Traits, true>;

 public:
  CUTLASS_DEVICE Fp8WidePairLoader(CachedCall const& call, CacheSource const& source,
                                   EightBits const& format, typename Traits::SharedStorage& shared)
      : source_(source),
        keys_(call, source, format, shared),
        values_(call, source, format, shared) {}

  CUTLASS_DEVICE void load(WorkWalk<Traits> const& walk) {
    Keys::find_and_copy(source_, walk, [&](FoundRow const& row, int head) {
      keys_.copy(row, head);
      values_.copy(row, head);
    });
  }
  CUTLASS_DEVICE void finish() {
    keys_.fill_groups();
    values_.fill_groups();
    CUTLASS_PRAGMA_NO_UNROLL
    while (keys_.has_staged()) {
      keys_.convert_next();
      values_.convert_next();
    }
  }
  CUTLASS_DEVICE static void drain() {}

 private:
  CacheSource const& source_;
  Keys keys_;
  Values values_;
};

}  // namespace cute_kernels::attention
