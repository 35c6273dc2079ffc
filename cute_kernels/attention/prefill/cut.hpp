#pragma once

#include "cute_kernels/attention/schedule/work_list.hpp"

// The last tiles of a list, cut into pieces of one warpgroup's rows: where they do not fill the
// last round of CTAs, as many of them as there are pieces do in little more than half of the time
// that a whole tile takes. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// Which tiles of a list are cut: those from `first` on, each into `pieces` at most.
struct TileCut {
  int first;
  int pieces;

  /// Of `tiles` tiles with `heads` heads each. Where a tile's pieces would need one more round,
  /// none is cut.
  constexpr TileCut(int tiles, int heads, int ctas, int pieces) : first(tiles), pieces(pieces) {
    int const over = static_cast<int>(int64_t{tiles} * heads % ctas);
    int const cut = (over + heads - 1) / heads;  // for all of their heads
    int64_t const places = int64_t{tiles + cut * (pieces - 1)} * heads;
    int64_t const rounds = int64_t{tiles} * heads / ctas + 1;
    if (places <= rounds * ctas) first = tiles - cut;
  }
};

/// How many tiles more a list may have for its cut, whatever its length is.
constexpr int most_cut(int heads, int ctas, int pieces) {
  return (ctas / heads + 1) * (pieces - 1);
}

/// A piece of a tile, of the warpgroup with `rows` rows from the `number`th on: a tile behind which
/// the sequence ends. It may have no rows.
constexpr WorkTile piece_of(WorkTile tile, int number, int rows) {
  tile.first_row += number * rows;
  tile.sequence.seqlen_q = lesser(tile.sequence.seqlen_q, tile.first_row + rows);
  return tile;
}

constexpr bool has_rows(WorkTile const& tile, int rows) {
  return tile.first_row + rows > 0 && tile.first_row < tile.sequence.seqlen_q;
}

}  // namespace cute_kernels::attention
