#pragma once

#include "cute_kernels/attention/forward/traits.hpp"
#include "cute_kernels/attention/prefill/calls.hpp"

namespace cute_kernels::attention {

/// Everything about a kernel for many queries to a cache that is known when it is compiled: a
/// forward kernel but for where rows come from and go to.
template <class Tile>
struct PrefillTile : Tile {
  static constexpr int kHeadDimV = Tile::kHeadDim;
  static constexpr bool kAnyCall = true;
  using Variant = NoVariant;
  static constexpr bool kSeparateOutput = true;
};

template <class Tile>
struct PrefillTraits : ForwardTraits<PrefillTile<Tile>> {
  using Common = ForwardTraits<PrefillTile<Tile>>;
  using Calls = CacheCalls<Common::Tiling::kNeighbours>;
  static constexpr bool kGroupedRows = true;

  static_assert(Common::kHeadDim % 64 == 0 && Common::kTileN % 32 == 0,
                "rows are gathered 32 at a time, to columns of 64");

  // Warps that gather rows need more than a thread that issues TMA does.
  static constexpr int kProducerRegisters = Common::kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters =
      Common::kConsumers == 2 ? 232 : Common::kConsumerRegisters;
};

}  // namespace cute_kernels::attention
