#pragma once

#include <cstdint>

#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cute/arch/cluster_sm90.hpp>

#include "cute_kernels/sm90/cluster.hpp"
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

/// The number of the only key block of a CTA that does not stay. Of all threads of a cluster. Where
/// dQ is in order, a CTA may have to wait for those with smaller numbers: then a cluster draws its
/// number, so that all smaller ones have been drawn by clusters that run, in whatever order the GPU
/// starts them.
template <class Traits, class Params>
CUTLASS_DEVICE int draw_key_block(Params const& params, typename Traits::SharedStorage& shared) {
  if (Traits::kPersistent || !params.dq_in_order) return blockIdx.x;
  uint32_t const rank = cute::block_rank_in_cluster();
  if (rank == 0 && threadIdx.x == 0) {
    sm90::wait_for_previous_kernel();  // it clears the counter
    int const drawn = atomicAdd(params.workspace.drawn, 1);
    for (uint32_t cta = 0; cta < Traits::kCluster; ++cta) {
      sm90::store_to_cta(&shared.number, drawn * Traits::kCluster, cta);
    }
  }
  __syncwarp();
  cute::cluster_sync();
  return shared.number + rank;
}

/// The loader's walk over the CTA's key blocks: work(coord) for each. A CTA that stays draws its
/// numbers from a counter in global memory, the next one in time to load it while the others still
/// compute. Even the first: every number is then drawn by a CTA that runs, after all smaller ones,
/// which it may have to wait for (dQ in order). A CTA that does not stay has `number`. Called by
/// one thread.
template <class Traits, class Params, class Work>
CUTLASS_DEVICE void hand_out_key_blocks(Params const& params,
                                        typename Traits::SharedStorage& shared, int number,
                                        Work const& work) {
  if constexpr (Traits::kPersistent) {
    sm90::wait_for_previous_kernel();  // it clears the counter
    for (uint32_t phase = 1;; phase ^= 1) {
      number = atomicAdd(params.workspace.drawn, 1);
      shared.number_empty.wait(phase);
      shared.number = number;
      shared.number_full.arrive();
      if (number >= params.clusters * params.pairs) break;
      work(key_block_of<Traits>(params, number));
    }
  } else {
    work(key_block_of<Traits>(params, number));
  }
}

enum class Caller { kWarp, kThread };

/// The same walk for everyone else, by whole warps or by one thread.
template <class Traits, Caller kCaller, class Params, class Work>
CUTLASS_DEVICE void for_each_key_block(Params const& params, typename Traits::SharedStorage& shared,
                                       int number, Work const& work) {
  if constexpr (Traits::kPersistent) {
    for (uint32_t phase = 0;; phase ^= 1) {
      shared.number_full.wait(phase);
      number = shared.number;
      if constexpr (kCaller == Caller::kWarp) __syncwarp();
      if (kCaller == Caller::kThread || threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
        shared.number_empty.arrive();
      }
      if (number >= params.clusters * params.pairs) break;
      work(key_block_of<Traits>(params, number));
    }
  } else {
    work(key_block_of<Traits>(params, number));
  }
}

}  // namespace cute_kernels::attention
