#pragma once

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/variant/place.hpp"

namespace cute_kernels::attention {

/// What the hooks of a user's variant are told of a tile; without hooks nothing.
template <class Variant, class Params>
CUTLASS_DEVICE auto places_of(Params const& params, typename Params::Tile const& coord) {
  if constexpr (Variant::kHasHooks) {
    Sequence const sequence = params.sequence(coord);
    VariantArguments const& call = params.variant;
    int const batch = call.cu_seqlens_q == nullptr
                          ? sequence.batch
                          : entry_at(call.cu_seqlens_q, call.sequences, sequence.row_q);
    return SequencePlace(call, batch, coord.head, sequence);
  } else {
    return NoPlaces{};
  }
}

}  // namespace cute_kernels::attention
