#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/window/plan.hpp"

namespace cute_kernels::attention {

/// Which keys of its block a thread's two rows see. Almost all columns are seen by all rows, so
/// that a warp looks from both ends, eight columns at a time, only as far as some row has an end.
template <int kColumns>
class WindowBlockMask {
  static constexpr int kRows = 2;
  static constexpr int kRun = 8;  // columns, of which a thread has two
  static constexpr int kRuns = kColumns / kRun;

 public:
  /// Of rows that are the warpgroup's queries `own` and `other`, the warp's being those from
  /// `first` up to `last`, counted from the tile's first. `shift` is that of the warpgroup's block.
  CUTLASS_DEVICE WindowBlockMask(SeenTile const& tile, int shift, int first, int last, int own,
                                 int other, int lane)
      : first_end_(tile.end_seen(first) - shift), last_begin_(tile.first_seen(last) - shift) {
    int const column = lane % 4 * 2 + shift;
    begin_[0] = tile.first_seen(own) - column;
    begin_[1] = tile.first_seen(other) - column;
    end_[0] = tile.end_seen(own) - column;
    end_[1] = tile.end_seen(other) - column;
  }

  /// Sets the scores of unseen keys to -inf: a (row, column) view of the accumulator.
  template <class Scores>
  CUTLASS_DEVICE void apply(Scores& scores) const {
    hide_ends<kRuns - 1>(scores);
    hide_begins<0>(scores);
  }

 private:
  template <int kIndex, class Scores>
  CUTLASS_DEVICE void hide_ends(Scores& scores) const {
    if constexpr (kIndex >= 0) {
      if (first_end_ >= (kIndex + 1) * kRun) return;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2 * kRows; ++i) {
        if (kIndex * kRun + i % 2 >= end_[i / 2]) scores(i / 2, 2 * kIndex + i % 2) = -INFINITY;
      }
      hide_ends<kIndex - 1>(scores);
    }
  }

  template <int kIndex, class Scores>
  CUTLASS_DEVICE void hide_begins(Scores& scores) const {
    if constexpr (kIndex < kRuns) {
      if (last_begin_ <= kIndex * kRun) return;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2 * kRows; ++i) {
        if (kIndex * kRun + i % 2 < begin_[i / 2]) scores(i / 2, 2 * kIndex + i % 2) = -INFINITY;
      }
      hide_begins<kIndex + 1>(scores);
    }
  }

  int first_end_;   // the first end of a row of the warp
  int last_begin_;  // the last beginning
  int begin_[kRows];
  int end_[kRows];
};

}  // namespace cute_kernels::attention
