#pragma once

#include <cstdint>

#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>

#include "cute_kernels/sm90/dependent_launch.hpp"

namespace cute_kernels::attention {

/// kTileN keys of one KV head of one batch entry.
struct KeyBlockCoord {
  int n_block;
  int kv_head;
  int batch;
};

/// The keys of number `number`: the first clusters of a group of heads, then the second ones, and
/// so on.
template <class Traits, class Params>
CUTLASS_DEVICE KeyBlockCoord key_block_of(Params const& params, int number) {
  int const cluster = number / Traits::kCluster;
  int const first_pair = cluster / (params.clusters * params.group) * params.group;
  int const in_group = cluster - first_pair * params.clusters;
  int const group = min(params.group, params.pairs - first_pair);
  KeyBlockCoord coord;
  coord.n_block = in_group / group * Traits::kCluster + number % Traits::kCluster;
  params.heads_kv(coord.batch, coord.kv_head, first_pair + in_group % group);
  return coord;
}

/// The loader's walk over the CTA's key blocks: work(coord) for each. A CTA that stays draws its
/// numbers from a counter in global memory, the next one in time to load it while the others still
/// compute. Even the first: every number is then drawn by a CTA that runs, after all smaller ones,
/// which it may have to wait for (dQ in order). Called by one thread.
template <class Traits, class Params, class Work>
CUTLASS_DEVICE void hand_out_key_blocks(Params const& params,
                                        typename Traits::SharedStorage& shared, Work const& work) {
  if constexpr (Traits::kPersistent) {
    sm90::wait_for_previous_kernel();  // it clears the counter
    for (uint32_t phase = 1;; phase ^= 1) {
      int const number = atomicAdd(params.workspace.drawn, 1);
      shared.number_empty.wait(phase);
      shared.number = number;
      shared.number_full.arrive();
      if (number >= params.clusters * params.pairs) break;
      work(key_block_of<Traits>(params, number));
    }
  } else {
    work(key_block_of<Traits>(params, static_cast<int>(blockIdx.x)));
  }
}

enum class Caller { kWarp, kThread };

/// The same walk for everyone else, by whole warps or by one thread.
template <class Traits, Caller kCaller, class Params, class Work>
CUTLASS_DEVICE void for_each_key_block(Params const& params, typename Traits::SharedStorage& shared,
                                       Work const& work) {
  if constexpr (Traits::kPersistent) {
    for (uint32_t phase = 0;; phase ^= 1) {
      shared.number_full.wait(phase);
      int const number = shared.number;
      if constexpr (kCaller == Caller::kWarp) __syncwarp();
      if (kCaller == Caller::kThread || threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
        shared.number_empty.arrive();
      }
      if (number >= params.clusters * params.pairs) break;
      work(key_block_of<Traits>(params, number));
    }
  } else {
    work(key_block_of<Traits>(params, static_cast<int>(blockIdx.x)));
  }
}

}  // namespace cute_kernels::attention
