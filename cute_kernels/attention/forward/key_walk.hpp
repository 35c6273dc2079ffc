#pragma once

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/ranges.hpp"
#include "cute_kernels/attention/variant/block_lists.hpp"
#include "cute_kernels/sm90/uniform.hpp"

// The order in which a tile's blocks of keys are loaded and computed: from the last place of a
// range to the first. The blocks at them have ever smaller numbers.
namespace cute_kernels::attention {

/// All blocks that a mask leaves: a block's place is its number.
struct RangeWalk {
  BlockRange places;

  CUTLASS_DEVICE static int block(int place) { return place; }
};

/// Those that a block mask lists, in units of kTileN keys or more. None is certain to need no mask.
template <int kTileN>
struct ListWalk {
  static_assert(kMaskUnit % kTileN == 0, "a unit of a block mask is some whole blocks");
  static constexpr int kBlocksOfUnit = kMaskUnit / kTileN;

  BlockRow row;
  BlockRange places;

  CUTLASS_DEVICE explicit ListWalk(BlockRow const& row)
      : row(row), places{0, row.count() * kBlocksOfUnit, 0, 0} {}

  CUTLASS_DEVICE BlockEntry entry(int place) const { return row.entry(place / kBlocksOfUnit); }
  CUTLASS_DEVICE static int block(BlockEntry entry, int place) {
    return entry.unit() * kBlocksOfUnit + place % kBlocksOfUnit;
  }
  CUTLASS_DEVICE int block(int place) const { return block(entry(place), place); }
};

/// Of what a tile's loader brings, whose first query and mask these are.
template <class Traits, class Params, class Mask>
CUTLASS_DEVICE auto key_walk(Params const& params, typename Params::Tile const& coord,
                             Mask const& mask, int first_query) {
  if constexpr (Traits::Variant::kHasBlockMask) {
    static_assert(Traits::kTileM == kMaskUnit, "a tile has one unit's queries");
    return ListWalk<Traits::kTileN>(
        BlockRow(params.variant.blocks, params.batch(coord), coord.head, first_query / kMaskUnit));
  } else {
    return RangeWalk{mask.key_blocks(first_query, Traits::kTileM, Traits::kTileN)};
  }
}

}  // namespace cute_kernels::attention
