#pragma once

#include "cute_kernels/attention/decode/work.hpp"

namespace cute_kernels::attention {

/// How the rows of a part are numbered: those of a tile's key head behind those of the one before,
/// with room for kTileRows of each.
template <class Traits>
struct PartRows {
  static constexpr int kHeads = Traits::kHeads;
  static constexpr int kOfHead = Traits::kTileRows;
  static constexpr int kCount = kHeads * kOfHead;

  /// Of the tile's, which all heads have.
  CUTLASS_DEVICE static constexpr int in_tile(int row) { return kHeads > 1 ? row % kOfHead : row; }
  /// Of the tile's heads.
  CUTLASS_DEVICE static constexpr int head(int row) { return kHeads > 1 ? row / kOfHead : 0; }
  /// The i-th of those that there are, kHeads times the tile's `rows`.
  CUTLASS_DEVICE static constexpr int row(int i, int rows) {
    return kHeads > 1 && i >= rows ? i - rows + kOfHead : i;
  }
};

}  // namespace cute_kernels::attention
