#pragma once

#include <cstdint>

#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cute/arch/cluster_sm90.hpp>

#include "cute_kernels/attention/backward/slots.hpp"
#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/sm90/cluster.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/uniform.hpp"

namespace cute_kernels::attention {

enum class Caller { kWarp, kThread };

/// A value that all of a caller's threads have, where a warp's compiler knows that they do.
template <Caller kCaller>
CUTLASS_DEVICE int of_caller(int value) {
  if constexpr (kCaller == Caller::kWarp) {
    return sm90::uniform(value);
  } else {
    return value;
  }
}

/// kTileN keys of one KV head of one batch entry.
struct KeyBlockCoord {
  int n_block;
  int kv_head;
  int batch;

  CUTLASS_DEVICE int batch_entry() const { return batch; }

  template <class Params>
  CUTLASS_DEVICE Mask const& mask(Params const& params) const {
    return params.masks;
  }
  template <class Params>
  CUTLASS_DEVICE bool hides_values(Params const& params) const {
    return params.masks.hides_values();
  }

  /// Of the loads and stores of TMA.
  CUTLASS_DEVICE TmaRows tma_q() const { return dense_tma_rows(batch); }
  CUTLASS_DEVICE TmaRows tma_k() const { return dense_tma_rows(batch); }
  CUTLASS_DEVICE TmaRows tma_grad_k() const { return dense_tma_rows(batch); }

  /// Where the first query stands in Q or dO, of head 0.
  CUTLASS_DEVICE int64_t first_of_q(TensorView const& view) const {
    return batch * view.batch_stride;
  }
  /// The same of the first key, and how many rows of K's tensors are the sequence's.
  CUTLASS_DEVICE int64_t first_of_k(TensorView const& view) const {
    return batch * view.batch_stride;
  }
  template <class Params>
  CUTLASS_DEVICE int rows_of_k(Params const& params) const {
    return params.masks.seqlen_k;
  }

  /// The number of the first query block of a head of Q.
  template <class Params>
  CUTLASS_DEVICE int64_t first_query_block(Params const& params, int head) const {
    return (static_cast<int64_t>(batch) * params.heads + head) * params.workspace.m_blocks.divisor;
  }
};

/// The same for every mask and for packed sequences. Stands in shared memory.
struct SequenceKeyBlock {
  int n_block;
  int kv_head;
  BlockRange queries;  // blocks that the cluster takes; some of them need no mask for these keys
  bool has_keys;       // the cluster's CTAs; there are numbers without
  BackwardSequence sequence;

  CUTLASS_DEVICE int batch_entry() const { return sequence.batch; }  // of a dense call

  template <class Params>
  CUTLASS_DEVICE WindowMask mask(Params const&) const {
    return WindowMask(sequence.ranges);
  }
  template <class Params>
  CUTLASS_DEVICE bool hides_values(Params const&) const {
    return sequence.hides_values();
  }

  CUTLASS_DEVICE TmaRows tma_q() const { return sequence.tma_q; }
  CUTLASS_DEVICE TmaRows tma_k() const { return sequence.tma_k; }
  CUTLASS_DEVICE TmaRows tma_grad_k() const { return sequence.tma_grad_k; }

  CUTLASS_DEVICE int64_t first_of_q(TensorView const& view) const {
    return sequence.offset_of_q(view.batch_stride, view.seqlen_stride);
  }
  CUTLASS_DEVICE int64_t first_of_k(TensorView const& view) const {
    return sequence.batch * view.batch_stride + sequence.k.first * view.seqlen_stride;
  }
  template <class Params>
  CUTLASS_DEVICE int rows_of_k(Params const&) const {
    return sequence.k.rows;
  }

  template <class Params>
  CUTLASS_DEVICE int64_t first_query_block(Params const& params, int head) const {
    return sequence.first_query_block +
           static_cast<int64_t>(head) * params.workspace.m_blocks.divisor;
  }
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

/// The same for every mask and for packed sequences, whose blocks are counted over all of them; of
/// numbers behind the last one the last block, without keys.
template <class Traits, class Params>
CUTLASS_DEVICE SequenceKeyBlock find_key_block(Params const& params, int number) {
  constexpr int kClusterKeys = Traits::kTileN * Traits::kCluster;
  AttentionCall const& call = params.masks;
  int const last = params.clusters * params.pairs * Traits::kCluster - 1;
  KeyBlockCoord coord = key_block_of<Traits>(params, min(number, last));
  int entry = coord.batch;
  if (call.is_packed()) {
    PackedSlots const slots = slots_of_k(call);
    int const cluster = coord.n_block / Traits::kCluster;
    entry = slots.slot_of(cluster, kClusterKeys);
    coord.n_block -= slots.first_block(entry, kClusterKeys) * Traits::kCluster;
  }
  BackwardSequence const sequence = backward_sequence(call, entry, Traits::kTileM);
  int const first_key = coord.n_block / Traits::kCluster * kClusterKeys;
  auto queries_of = [&](int key, int keys) {
    return sequence.ranges.query_blocks(key, keys, Traits::kTileM);
  };
  BlockRange const own = queries_of(coord.n_block * Traits::kTileN, Traits::kTileN);
  BlockRange const of_cluster = queries_of(first_key, kClusterKeys);
  int full_end = own.full_end;
  if constexpr (Traits::Variant::kHasHooks && Traits::kChanges) {
    // What hooks say of queries behind the last need not be finite.
    full_end = lesser(full_end, sequence.ranges.seqlen_q / Traits::kTileM);
  }
  return {coord.n_block,
          coord.kv_head,
          {of_cluster.begin, of_cluster.end, own.full_begin, full_end},
          number <= last && first_key < sequence.k.rows,
          sequence};
}

/// The number of the only key block of a CTA that does not stay. Of all threads of a cluster. Where
/// dQ is in order, a CTA may have to wait for those with smaller numbers: then a cluster draws its
/// number, so that all smaller ones have been drawn by clusters that run, in whatever order the GPU
/// starts them.
template <class Traits, class Params>
CUTLASS_DEVICE int draw_key_block(Params const& params, typename Traits::SharedStorage& shared) {
  if (Traits::kPersistent || !params.dq_in_order) return params.first_number + blockIdx.x;
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

/// The key block of a number for all of a CTA's roles: worked out by each, or where that takes a
/// search, found by one thread and left in shared memory, at the block's parity. There it stays
/// until the next but one is found: by then all have read the next one's number, and are done with
/// it.
template <class Traits, class Params>
CUTLASS_DEVICE decltype(auto) key_block(Params const& params,
                                        typename Traits::SharedStorage const& shared, int number,
                                        uint32_t parity) {
  if constexpr (Traits::kAnyCall) {
    return (shared.key_blocks[parity]);
  } else {
    return key_block_of<Traits>(params, number);
  }
}

/// Finds the only key block of a CTA that does not stay. Of all its threads.
template <class Traits, class Params>
CUTLASS_DEVICE bool find_only_key_block(Params const& params,
                                        typename Traits::SharedStorage& shared, int number) {
  if (threadIdx.x == 0) shared.key_blocks[0] = find_key_block<Traits>(params, number);
  __syncthreads();
  return shared.key_blocks[0].has_keys;
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
      if constexpr (Traits::kAnyCall) {
        SequenceKeyBlock found = find_key_block<Traits>(params, number);
        while (number < params.clusters * params.pairs && !found.has_keys) {
          number = atomicAdd(params.workspace.drawn, 1);
          found = find_key_block<Traits>(params, number);
        }
        shared.number_empty.wait(phase);
        shared.key_blocks[phase] = found;
      } else {
        shared.number_empty.wait(phase);
      }
      shared.number = number;
      shared.number_full.arrive();
      if (number >= params.clusters * params.pairs) break;
      work(key_block<Traits>(params, shared, number, phase));
    }
  } else {
    work(key_block<Traits>(params, shared, number, 0));
  }
}

/// The same walk for everyone else, by whole warps or by one thread.
template <class Traits, Caller kCaller, class Params, class Work>
CUTLASS_DEVICE void for_each_key_block(Params const& params, typename Traits::SharedStorage& shared,
                                       int number, Work const& work) {
  if constexpr (Traits::kPersistent) {
    for (uint32_t phase = 0;; phase ^= 1) {
      shared.number_full.wait(phase);
      number = shared.number;
      if constexpr (kCaller == Caller::kWarp) {
        if constexpr (Traits::kAnyCall) {
          number = sm90::uniform(number);
        } else {
          __syncwarp();
        }
      }
      if (kCaller == Caller::kThread || threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
        shared.number_empty.arrive();
      }
      if (number >= params.clusters * params.pairs) break;
      work(key_block<Traits>(params, shared, number, phase ^ 1));
    }
  } else {
    work(key_block<Traits>(params, shared, number, 0));
  }
}

}  // namespace cute_kernels::attention
