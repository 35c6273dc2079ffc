#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/key_blocks.hpp"
#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/variant/place.hpp"
#include "cute_kernels/sm90/opaque.hpp"

namespace cute_kernels::attention {

/// What the hooks of a user's variant are told of a key block and the first head of Q; without
/// hooks nothing.
template <class Traits, Caller kCaller, class Params>
CUTLASS_DEVICE auto places_of(Params const& params, typename Traits::KeyBlock const& coord) {
  if constexpr (Traits::Variant::kHasHooks) {
    auto const& sequence = coord.sequence;
    VariantArguments const& call = params.variant;
    int const batch = call.cu_seqlens_k == nullptr
                          ? sequence.batch
                          : entry_at(call.cu_seqlens_k, call.sequences, sequence.k.first);
    auto const of_all = [](int value) { return of_caller<kCaller>(value); };
    return SequencePlace(call, of_all(batch), 0,
                         {sequence.batch, of_all(sequence.q.first), of_all(sequence.k.first),
                          of_all(sequence.ranges.seqlen_q), of_all(sequence.ranges.seqlen_k)});
  } else {
    return NoPlaces{};
  }
}

/// Where the elements of a transposed block of scores stand; the thread's first one is at `key` and
/// `query`.
template <class Traits, class Places>
CUTLASS_DEVICE auto transposed_places(Places const& places, int key, int query) {
  int const here = Traits::Variant::kHasHooks ? sm90::opaque(key) : key;
  return [=, &places](int row, int col) {
    return places.template at<typename Traits::Variant>(query + 8 * (col / 2) + col % 2,
                                                        here + 8 * row);
  };
}

/// A call's mask and that of a variant's hook, on transposed scores.
template <class Traits, class Params, class Mask, class Places>
struct HookedMask {
  Params const& params;
  Mask mask;
  Places const& places;
  bool is_full;  // hooks hide nothing

  template <class Scores>
  CUTLASS_DEVICE void apply_transposed(Scores& scores, int key, int query, float hidden) const {
    mask.apply_transposed(scores, key, query, hidden);
    if (is_full) return;
    auto const place = transposed_places<Traits>(places, key, query);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < cute::size<0>(scores); ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < cute::size<1>(scores); ++col) {
        if (!Traits::Variant::Hooks::mask(place(row, col), params.variant)) {
          scores(row, col) = hidden;
        }
      }
    }
  }
};

/// All that hides keys from a step's queries.
template <class Traits, class Params, class Places>
CUTLASS_DEVICE decltype(auto) mask_of_step(Params const& params,
                                           typename Traits::KeyBlock const& coord,
                                           Places const& places, bool is_full) {
  if constexpr (Traits::Variant::kHides) {
    auto const mask = coord.mask(params);
    return HookedMask<Traits, Params, std::decay_t<decltype(mask)>, Places>{params, mask, places,
                                                                            is_full};
  } else {
    return coord.mask(params);
  }
}

}  // namespace cute_kernels::attention
