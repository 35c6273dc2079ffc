#pragma once

#include "cute_kernels/attention/decode/fp8_warps_traits.hpp"
#include "cute_kernels/attention/decode/fp8_wide_traits.hpp"

namespace cute_kernels::attention {

/// A kernel of a row of tile_configs.toml that attends to a cache of 8 bits, e4m3 or int8. All of
/// these numbers are float16 numbers too, and products are those of float16, for queries of any
/// type. Tiles of less than WGMMA's rows are warps' own.
template <class Tile>
using Fp8DecodeTraits = std::conditional_t<(Tile::kTileM < DecodeTraits<Tile>::kWarpgroupM),
                                           Fp8WarpsTraits<Tile>, Fp8WideTraits<Tile>>;

}  // namespace cute_kernels::attention
