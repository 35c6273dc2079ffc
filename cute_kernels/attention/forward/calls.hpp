#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/attention/schedule/list_scheduler.hpp"
#include "cute_kernels/attention/tile_scheduler.hpp"
#include "cute_kernels/sm90/opaque.hpp"

// What a forward kernel is told of its calls: which tiles there are, where their rows lie, and what
// they see. One of these is a part of its parameters.
namespace cute_kernels::attention {

/// Dense calls whose queries see all keys or those up to their own position: lengths and mask are
/// constants of the launch.
template <int kTileM>
struct DenseCalls {
  using Scheduler = TileScheduler;
  using Tile = TileCoord;
  static constexpr bool kHasLeftEnd = Mask::kHasLeftEnd;

  Mask mask;
  TileScheduler::Params scheduler;

  CUTLASS_DEVICE Mask const& mask_of(Tile const&) const { return mask; }
  CUTLASS_DEVICE int first_query(Tile const& tile) const {
    return first_query_of_tile(mask.seqlen_q, kTileM, scheduler.m_blocks, tile.m_block);
  }
  CUTLASS_DEVICE int batch(Tile const& tile) const { return tile.batch; }
  CUTLASS_DEVICE static cute::_0 row_q(Tile const&) { return {}; }
  CUTLASS_DEVICE static cute::_0 row_k(Tile const&) { return {}; }

  /// The same tile, of which the compiler knows nothing any more: what is computed from it is
  /// computed again.
  CUTLASS_DEVICE static Tile forgotten(Tile tile) {
    tile.m_block = sm90::opaque(tile.m_block);
    return tile;
  }
};

/// All calls: a tile stands in the work list, where it is read again rather than kept.
template <int kNeighbours, bool kMovesOn = true>
struct AnyCalls {
  using Scheduler = ListScheduler<kNeighbours, kMovesOn>;
  using Tile = ListedTile;
  static constexpr bool kHasLeftEnd = WindowMask::kHasLeftEnd;

  typename Scheduler::Params scheduler;
  float const* sinks;  // (heads), or null

  /// -inf where there is none.
  CUTLASS_DEVICE float sink(Tile const& tile) const {
    return sinks == nullptr ? -INFINITY : sinks[tile.head];
  }

  CUTLASS_DEVICE WindowMask mask_of(Tile const& tile) const {
    return WindowMask(work(tile).ranges());
  }
  CUTLASS_DEVICE int first_query(Tile const& tile) const { return work(tile).first_row; }
  CUTLASS_DEVICE Sequence sequence(Tile const& tile) const { return work(tile).sequence; }
  CUTLASS_DEVICE int batch(Tile const& tile) const { return work(tile).sequence.batch; }
  CUTLASS_DEVICE int row_q(Tile const& tile) const { return work(tile).sequence.row_q; }
  CUTLASS_DEVICE int row_k(Tile const& tile) const { return work(tile).sequence.row_k; }

  CUTLASS_DEVICE static Tile forgotten(Tile tile) {
    tile.entry = sm90::opaque(tile.entry);
    return tile;
  }

 private:
  CUTLASS_DEVICE WorkTile const& work(Tile const& tile) const {
    return scheduler.tiles[tile.entry];
  }
};

}  // namespace cute_kernels::attention
