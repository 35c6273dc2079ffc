#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/sm90/semaphore.hpp"

// Where dQ is added in no order it begins as zeros. Preprocess writes those of the first group of
// heads; those of every other group are written in the main kernel, beside the work on the group
// before it, when memory has little to do.
namespace cute_kernels::attention {

/// The number of a key block's group of heads.
template <class Params, class KeyBlock>
CUTLASS_DEVICE int group_of_heads(Params const& params, KeyBlock const& coord) {
  return (coord.batch_entry() * params.heads_kv.divisor + coord.kv_head) / params.group;
}

/// A key block's share of the zeros of the next group: every key block of a group has one. Of a
/// whole warp.
///
/// Who waits for whom: workspace.cleared[g] counts the shares of group g that are written. The
/// threads that add to dQ of group g wait for all of them; they are the shares of key blocks with
/// smaller numbers, which CTAs that run have drawn, and this warp waits for nothing but its key
/// blocks' numbers.
template <class Traits, class Params>
CUTLASS_DEVICE void clear_next_group(Params const& params, typename Traits::KeyBlock const& coord) {
  int const next = group_of_heads(params, coord) + 1;
  int const first_pair = next * params.group;
  if (first_pair >= params.pairs) return;
  int const m_blocks = params.workspace.m_blocks.divisor;
  int const pair = coord.batch_entry() * params.heads_kv.divisor + coord.kv_head;
  int const shares = params.clusters * params.group;  // a group with one behind it is whole
  int const own_share = coord.n_block * params.group + pair % params.group;
  int const blocks = min(params.group, params.pairs - first_pair) * params.heads_per_kv * m_blocks;
  int64_t const first_block = static_cast<int64_t>(first_pair) * params.heads_per_kv * m_blocks;
  constexpr int kFloat4s = Traits::kTileM * Traits::kHeadDim / 4;
  for (int block = own_share; block < blocks; block += shares) {
    auto* const dq =
        reinterpret_cast<float4*>(params.workspace.dq) + (first_block + block) * kFloat4s;
#pragma unroll 4
    for (int i = threadIdx.x % cutlass::NumThreadsPerWarp; i < kFloat4s;
         i += cutlass::NumThreadsPerWarp) {
      dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  __threadfence();
  __syncwarp();
  if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
    sm90::semaphore_advance(params.workspace.cleared + next);
  }
}

/// Until dQ of the key block's heads is cleared. Of a thread that then adds to it.
template <class Params, class KeyBlock>
CUTLASS_DEVICE void wait_until_cleared(Params const& params, KeyBlock const& coord) {
  if (!params.clears_ahead) return;
  int const group = group_of_heads(params, coord);
  if (group == 0) return;
  sm90::semaphore_wait(params.workspace.cleared + group, params.clusters * params.group);
}

}  // namespace cute_kernels::attention
