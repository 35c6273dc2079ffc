#pragma once

#include <cutlass/fast_math.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/sm90/finite.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/opaque.hpp"
#include "cute_kernels/sm90/tanh.hpp"

namespace cute_kernels::attention {

/// What becomes of scores q k before the softmax, whose exponent is 2^(log2_of_unit * s).
struct ScoreUnits {
  float cap_scale;     // with a softcap c: s = c tanh(cap_scale * q k)
  float softcap;       // 0: none, s = q k
  float log2_of_unit;  // log2(e), times the softmax scale where that is not in s already
};

template <class Scores>
CUTLASS_DEVICE void cap_scores(ScoreUnits const& units, Scores& scores) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) {
    scores(i) = units.softcap * sm90::tanh_mufu(scores(i) * units.cap_scale);
  }
}

/// The first of a thread's columns of an accumulator, and where the others are, seen from it: pairs
/// of columns, 8 apart.
CUTLASS_DEVICE int first_accumulator_column(uint32_t thread) { return thread % 4 * 2; }
CUTLASS_DEVICE int first_accumulator_column() { return first_accumulator_column(threadIdx.x); }
CUTLASS_DEVICE constexpr int accumulator_column(int col) { return 8 * (col / 2) + col % 2; }

/// The first of a consumer thread's rows of its warpgroup's 64; the other one is 8 further.
CUTLASS_DEVICE int first_accumulator_row() {
  constexpr int kRowsOfWarp = 16;
  return threadIdx.x % cutlass::NumThreadsPerWarpGroup / 32 * kRowsOfWarp + threadIdx.x % 32 / 4;
}

/// Where a thread's columns of O and its rows, 8 apart, begin in the tile.
struct AccumulatorPlace {
  int row;
  int column;
};

/// Sets the scores of a row's unseen keys to -inf; the first column is key `key`.
template <class Scores>
CUTLASS_DEVICE void mask_row(Scores& scores, int row, KeySpan const& seen, int key) {
  int const first = seen.begin - key - first_accumulator_column();
  int const limit = seen.end - key - first_accumulator_column();
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < cute::size<1>(scores); ++col) {
    int const offset = accumulator_column(col);
    if (offset < first || offset >= limit) scores(row, col) = -INFINITY;
  }
}

/// The same where the thread's first column is key `key`: of many columns less is in registers at a
/// time than with two comparisons for each.
template <class Scores>
CUTLASS_DEVICE void mask_row_by_bits(Scores& scores, int row, KeySpan const& seen, int key) {
  constexpr int kColumns = decltype(cute::size<1>(scores))::value;
  uint32_t const shown = columns_between<kColumns>(seen.begin - key, seen.end - key);
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < kColumns; ++col) {
    if ((shown >> col & 1) == 0) scores(row, col) = -INFINITY;
  }
}

/// Which keys of a part a consumer thread's rows of the tile see, and what is done about those that
/// they do not, by blocks of kTileN keys. Of an accumulator a thread has two rows, 8 apart. What
/// only few blocks need is worked out there: registers are scarce.
template <class Traits, int kTileN = Traits::kTileN>
class SeenKeys {
  using Element = typename Traits::Element;
  using Walk = WorkWalk<Traits>;
  static constexpr int kNoKey = 0x7fffffff;
  static constexpr int kBitsOfTree = 64;

 public:
  static constexpr int kRows = 2;

  /// `first_row`: the thread's, of the tile.
  CUTLASS_DEVICE SeenKeys(CachedCall const& call, cutlass::FastDivmod const& group,
                          Walk const& walk, int first_row)
      : call_(call), group_(group), walk_(walk), first_row_(first_row) {
    RowTile<Traits> const& tile = walk.tile();
    KeySpan by_all = walk.sequence().seen_by_all(tile.first_query, tile.last_query);
    by_all.end = min(by_all.end, first_new());
    begin_full_ = (by_all.begin - tile.keys.begin + kTileN - 1) / kTileN;
    end_full_ = (by_all.end - tile.keys.begin) / kTileN;
    end_alike_ = by_all.end >= tile.keys.end ? kNoKey : end_full_;
  }

  CUTLASS_DEVICE int first_key(int block) const { return walk_.tile().keys.begin + block * kTileN; }
  /// Whether no row sees a key of a block that another one does not.
  CUTLASS_DEVICE bool are_alike(int block) const {
    return block >= begin_full_ && block < end_alike_;
  }
  CUTLASS_DEVICE bool is_seen(int row, int key) const {
    KeySpan const span = seen_by(row);
    return key >= span.begin && key < span.end &&
           (key < first_new() || (new_keys_seen(row, key - first_new()) & 1) != 0);
  }

  /// Sets the scores of a block's unseen keys to -inf. Of all rows or of the first one.
  template <class Scores>
  CUTLASS_DEVICE void mask(Scores& scores, int block) const {
    static_assert(kTileN <= kBitsOfTree, "mask_by_bits() takes as many bits at a time");
    if (block >= begin_full_ && block < end_full_) return;
    int const key = first_key(block);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < cute::size<0>(scores); ++row) {
      mask_row(scores, row, seen_by(row), key);
    }
    if (key + kTileN > first_new()) mask_new(scores, key);
  }
  /// The same, where registers are scarce.
  template <class Scores>
  CUTLASS_DEVICE void mask_by_bits(Scores& scores, int block) const {
    if (block >= begin_full_ && block < end_full_) return;
    int const key = first_key(block);
    // Not kept from block to block.
    int const own = key + first_accumulator_column(sm90::opaque(threadIdx.x));
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < cute::size<0>(scores); ++row) {
      mask_row_by_bits(scores, row, seen_by(row), own);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < kTileN; half += kBitsOfTree) {
      if (key + half + kBitsOfTree > first_new()) mask_new_half(scores, half, own - first_new());
    }
  }

  /// Keeps NaN and infinities of V out of rows that do not see them, where P is 0 but P V would
  /// still be NaN: they become 0 in a block that some rows see and others do not. Whether there
  /// are any. `data`: kColumns columns of the block, which have landed, and which none but the
  /// threads of this warpgroup, number `warpgroup`, read.
  template <int kColumns>
  CUTLASS_DEVICE bool clear_values(int block, Element* data, int warpgroup) const {
    constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
    constexpr int kElements = kTileN * kColumns;
    constexpr auto kCleared = sm90::NamedBarrier::kValuesCleared;
    if (are_alike(block)) return false;
    int const thread = threadIdx.x % kThreads;
    bool const own = sm90::all_finite<kThreads, kElements>(data, thread);
    if (sm90::barrier_all(kCleared, warpgroup, kThreads, own)) return false;
    sm90::clear_nonfinite<kThreads, kElements>(data, thread);
    cutlass::arch::fence_view_async_shared();
    sm90::barrier_sync(kCleared, warpgroup, kThreads);
    return true;
  }

  /// Rows of V behind the last key that some row sees become 0, whatever they are: P is 0 there,
  /// and nothing says that they are finite. `data` as above.
  template <int kColumns>
  CUTLASS_DEVICE void clear_values_behind(int block, Element* data, int warpgroup) const {
    constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
    constexpr int kVectors = 128 / sizeof(uint4);  // of a row of the swizzle
    constexpr int kChunks = kColumns * sizeof(Element) / 128;
    int const rows = walk_.tile().keys.end - walk_.tile().keys.begin - block * kTileN;
    if (rows >= kTileN) return;
    auto* const vectors = reinterpret_cast<uint4*>(data);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = rows * kVectors + threadIdx.x % kThreads; i < kTileN * kVectors; i += kThreads) {
      CUTLASS_PRAGMA_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        vectors[chunk * kTileN * kVectors + i] = uint4{};
      }
    }
    cutlass::arch::fence_view_async_shared();
    sm90::barrier_sync(sm90::NamedBarrier::kValuesCleared, warpgroup, kThreads);
  }

 private:
  CUTLASS_DEVICE int query_of(int row) const {
    return group_.div(walk_.tile().first_row + first_row_ + 8 * row);
  }
  CUTLASS_DEVICE KeySpan seen_by(int row) const { return walk_.sequence().seen_by(query_of(row)); }

  /// The first of the keys of which a tree says who sees them; where there is no tree none is.
  CUTLASS_DEVICE int first_new() const {
    WindowRanges const& ranges = walk_.sequence().ranges;
    return call_.tree_mask == nullptr ? kNoKey : ranges.seqlen_k - ranges.seqlen_q;
  }
  /// Bit i: whether a row sees number `first` + i of these, or a key before them. Read where it is
  /// needed: few blocks have such keys.
  CUTLASS_DEVICE uint64_t new_keys_seen(int row, int first) const {
    constexpr int kBits = 64;
    if (first <= -kBits) return ~uint64_t{0};
    int const query = query_of(row);
    if (first >= kBits || query >= walk_.sequence().ranges.seqlen_q) return 0;
    auto const* const of_query = call_.tree_mask + walk_.sequence().row_q + query;
    uint64_t const bits = static_cast<uint64_t>(__ldg(of_query));
    return first >= 0 ? bits >> first : bits << -first | ((uint64_t{1} << -first) - 1);
  }

  /// Sets the scores of keys that a tree hides to -inf.
  template <class Scores>
  CUTLASS_DEVICE void mask_new(Scores& scores, int key) const {
    int const first = key + first_accumulator_column() - first_new();
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < cute::size<0>(scores); ++row) {
      uint64_t const seen = new_keys_seen(row, first);
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < cute::size<1>(scores); ++col) {
        if ((seen >> accumulator_column(col) & 1) == 0) scores(row, col) = -INFINITY;
      }
    }
  }

  /// The same of as many keys as a tree has bits, from key `half` of the block on; the thread's
  /// first column is number `first` of the tree's.
  template <class Scores>
  CUTLASS_DEVICE void mask_new_half(Scores& scores, int half, int first) const {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < cute::size<0>(scores); ++row) {
      uint64_t const seen = new_keys_seen(row, first + half);
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < cute::size<1>(scores); ++col) {
        int const bit = accumulator_column(col) - half;
        if (bit >= 0 && bit < kBitsOfTree && (seen >> bit & 1) == 0) scores(row, col) = -INFINITY;
      }
    }
  }

  CachedCall const& call_;
  cutlass::FastDivmod const& group_;
  Walk const& walk_;
  int first_row_;
  // Blocks of which all rows see all keys, and behind these the end of those that are alike.
  int begin_full_;
  int end_full_;
  int end_alike_;
};

}  // namespace cute_kernels::attention
