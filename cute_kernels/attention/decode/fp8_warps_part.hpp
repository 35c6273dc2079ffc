#pragma once

#include "cute_kernels/attention/decode/work.hpp"

// How the consumer warps of a cache of 8 bits share a part: one arithmetic on the device and on the
// host. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// What one of kWarps warps, a power of 2, computes of a part: kRows of the tile's rows, and of
/// their keys one slice of kKeysOfSlice in `step`. Slices are counted from the part's first key on;
/// a block has kSlices. As many warps share a tile's keys as its rows leave, so one token has all
/// warps on its keys.
template <int kWarps, int kTileN, int kKeysOfSlice = 32>
struct WarpPart {
  static constexpr int kRows = 16;
  static constexpr int kKeys = kKeysOfSlice;
  static constexpr int kSlices = kTileN / kKeys;
  static_assert(kTileN % kKeys == 0 && (kWarps & (kWarps - 1)) == 0);
  // Blocks from one of a warp's to its next one, at most.
  static constexpr int kMostTurns = kWarps > kSlices ? kWarps / kSlices : 1;

  int first_row;  // of the tile
  int step;       // how many warps share the rows' keys
  int slice;      // the warp's first
  int arrivals;   // of the kWarps that free a stage, those for a warp that reads it

  constexpr WarpPart(int rows, int warp) : first_row(0), step(kWarps), slice(0), arrivals(1) {
    int groups = 1;  // of rows
    for (; groups * kRows < rows; groups *= 2) step /= 2;
    first_row = warp * groups / kWarps * kRows;
    slice = warp & (step - 1);
    arrivals = step > kSlices ? step / kSlices : 1;
  }

  /// The first warp of those that share the rows.
  constexpr int first_warp() const { return first_row / kRows * step; }

  static constexpr int block(int slice) { return slice / kSlices; }
  /// Whether the warp's next slice is of another block.
  constexpr bool ends_block(int slice) const { return block(slice + step) != block(slice); }
};

}  // namespace cute_kernels::attention
