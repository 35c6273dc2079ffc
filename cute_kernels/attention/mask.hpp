#pragma once

#include <cute/tensor.hpp>

namespace cute_kernels::attention {

/// The key blocks that some consecutive queries visit, counted from key 0. The mainloop walks them
/// from the last to the first, so that the blocks that need a mask come first.
struct BlockRange {
  int visited;  // blocks with at least one visible key; 0 when no query sees any
  int full;     // how many of them, from key 0 on, every query sees whole
};

/// The query blocks that see some of a key block's keys, from `first` on. Those before `full` need
/// a mask.
struct QueryRange {
  int first;
  int full;
};

/// Which keys a query sees, decided at run time: all, or those up to its own position (causal). One
/// kernel serves both.
struct Mask {
  int seqlen_q;
  int seqlen_k;
  bool causal;

  /// The number of keys, from key 0 on, that a query sees; may be negative.
  CUTLASS_DEVICE int visible_keys(int query) const {
    return causal ? min(seqlen_k, query + 1 + seqlen_k - seqlen_q) : seqlen_k;
  }

  /// Whether some queries do not see keys that are there. Beyond the last key TMA brings zeros.
  CUTLASS_DEVICE bool hides_values() const { return causal; }

  /// Some of the queries, or all, may lie before the first or behind the last.
  CUTLASS_DEVICE BlockRange key_blocks(int first_query, int queries, int block) const {
    int const last_query = min(first_query + queries, seqlen_q) - 1;
    if (first_query > last_query || last_query < 0) return {0, 0};
    int const most = max(0, visible_keys(last_query));
    int const least = max(0, visible_keys(max(0, first_query)));
    return {(most + block - 1) / block, least / block};
  }

  /// The first query that sees a key.
  CUTLASS_DEVICE int first_query(int key) const {
    if (key >= seqlen_k) return kNoQuery;
    return causal ? max(0, key + seqlen_q - seqlen_k) : 0;
  }

  CUTLASS_DEVICE QueryRange query_blocks(int first_key, int keys, int block) const {
    int const all_seen = first_query(first_key + keys - 1);
    return {first_query(first_key) / block,
            all_seen == kNoQuery ? kNoQuery : (all_seen + block - 1) / block};
  }

  /// Sets the scores of unseen keys to -inf. `scores` is a (row, column) view of a 64 x N
  /// accumulator fragment; the thread's first row is `query`, its other one `query + 8`, its first
  /// column `key`.
  template <class Scores>
  CUTLASS_DEVICE void apply(Scores& scores, int query, int key) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(scores); ++row) {
      int const limit = visible_keys(query + 8 * row) - key;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        int const offset = 8 * (col / 2) + col % 2;  // pairs of columns, 8 apart
        if (offset >= limit) {
          scores(row, col) = -INFINITY;
        }
      }
    }
  }

  /// The same for transposed scores, or others: rows are keys, columns are queries. What is not
  /// seen becomes `hidden`.
  template <class Scores>
  CUTLASS_DEVICE void apply_transposed(Scores& scores, int key, int query, float hidden) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(scores); ++row) {
      int const first = first_query(key + 8 * row) - query;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        int const offset = 8 * (col / 2) + col % 2;
        if (offset < first) {
          scores(row, col) = hidden;
        }
      }
    }
  }

 private:
  static constexpr int kNoQuery = 1 << 30;
};

}  // namespace cute_kernels::attention
