#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/window/plan.hpp"
#include "cute_kernels/sm90/finite.hpp"

namespace cute_kernels::attention {

/// What of V is not finite, in a guarded pass over a CTA's tiles (CtaPasses): consumers clear it in
/// shared memory before their products, as 0 times NaN is NaN for rows that do not see it, and when
/// all tiles are stored give it back to the rows that do. Products and their order are the same as
/// ever, so rows that see none of it have the bits that 0 in its place would give.
template <class Element>
class WindowValueGuard {
  static constexpr int kLanes = 32;  // of a query, each with two channels

  struct alignas(2 * sizeof(Element)) Pair {
    Element low;
    Element high;
  };

 public:
  /// Adds to O what the rows of a tile see of V and is not finite, whatever its P is. Of some
  /// threads, of which the calling one is number `thread`; what they all stored must be visible.
  template <class Params>
  CUTLASS_DEVICE static void restore(Params const& params, WorkTile const& tile, int head_kv,
                                     int tile_rows, int thread, int threads) {
    SeenTile const seen = seen_tile(tile, params.group_log2, params.keys, head_kv);
    int const queries = lesser(seen.queries, tile_rows >> params.group_log2);
    int const first_row = tile.sequence.row_k - seen.first_key;
    for (int i = thread; i < queries * kLanes; i += threads) {
      int const query = i / kLanes, channel = i % kLanes * 2;
      if (channel >= params.head_dim_v) continue;
      int const first = seen.first_seen(query), end = seen.end_seen(query);
      Element const* value =
          rows_of<Element>(params.v, seen.batch, head_kv, first_row + first) + channel;
      float low = 0.f, high = 0.f;
#pragma unroll 4
      for (int key = first; key < end; ++key) {
        Pair const pair = *reinterpret_cast<Pair const*>(value);
        if (!sm90::is_finite(pair.low)) low += static_cast<float>(pair.low);
        if (!sm90::is_finite(pair.high)) high += static_cast<float>(pair.high);
        value += params.v.seqlen_stride;
      }
      if (low == 0.f && high == 0.f) continue;
      for (int head = head_kv << params.group_log2; head < (head_kv + 1) << params.group_log2;
           ++head) {
        Element* const result =
            rows_of<Element>(params.out, seen.batch, head, seen.row + query) + channel;
        if (low != 0.f) result[0] = static_cast<Element>(static_cast<float>(result[0]) + low);
        if (high != 0.f) result[1] = static_cast<Element>(static_cast<float>(result[1]) + high);
      }
    }
  }
};

}  // namespace cute_kernels::attention
