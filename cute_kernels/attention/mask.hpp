#pragma once

#include <cstdint>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/ranges.hpp"

namespace cute_kernels::attention {

/// Which keys a query sees, and what scores become of those that it does not.
struct Mask : CausalRanges {
  /// Whether some queries do not see keys that are there. Beyond the last key TMA brings zeros.
  CUTLASS_DEVICE bool hides_values() const { return causal; }

  /// Sets the scores of unseen keys to -inf. `scores` is a (row, column) view of a 64 x N
  /// accumulator fragment; the thread's first row is `query`, its other one `query + 8`, its first
  /// column `key`.
  template <class Scores>
  CUTLASS_DEVICE void apply(Scores& scores, int query, int key) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(scores); ++row) {
      int const limit = end_key(query + 8 * row) - key;
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
};

/// The same of every mask, which has two ends.
template <class Ranges>
struct TwoEndedMask : Ranges {
  explicit constexpr TwoEndedMask(Ranges const& ranges) : Ranges(ranges) {}

  /// Keys behind a sequence's last one are there too, and of another sequence.
  CUTLASS_DEVICE constexpr bool hides_values() const { return true; }

  template <class Scores>
  CUTLASS_DEVICE void apply(Scores& scores, int query, int key) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(scores); ++row) {
      int const first = this->first_key(query + 8 * row) - key;
      int const limit = this->end_key(query + 8 * row) - key;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        int const offset = 8 * (col / 2) + col % 2;
        if (offset < first || offset >= limit) scores(row, col) = -INFINITY;
      }
    }
  }

  /// Also behind the sequence's last query, where rows of another one are.
  template <class Scores>
  CUTLASS_DEVICE void apply_transposed(Scores& scores, int key, int query, float hidden) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(scores); ++row) {
      int const first = this->first_query(key + 8 * row) - query;
      int const limit = lesser(this->end_query(key + 8 * row), this->seqlen_q) - query;
      constexpr int kColumns = decltype(size<1>(scores))::value;
      uint32_t const seen = columns_between<kColumns>(first, limit);
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < kColumns; ++col) {
        if ((seen & uint32_t{1} << col) == 0) scores(row, col) = hidden;
      }
    }
  }
};

using WindowMask = TwoEndedMask<WindowRanges>;

}  // namespace cute_kernels::attention
