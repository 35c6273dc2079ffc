#pragma once

#include <cutlass/pipeline/pipeline.hpp>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/key_walk.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/tma_pipeline.hpp"

namespace cute_kernels::attention {

/// What every forward mainloop has: the loads of Q and K, the order of all loads, turns and
/// releases.
///
/// Who waits for whom:
/// - k, v pipelines. Full: consumers wait for the producer's TMA. Empty: the producer waits for
///   every consumer warp.
/// - q_full[i]: warpgroup i waits for its 64 queries.
/// - q_empty[i]: the producer waits until warpgroup i no longer needs the memory of its last
///   queries.
/// - kTurn + i: warpgroup i waits until warpgroup i-1 has issued its products (pingpong).
template <class Traits_>
class ForwardProtocol {
 public:
  using Traits = Traits_;

 protected:
  // In L2, Q makes room first and K and V last: other CTAs read them too.
  using Hint = cute::TMA::CacheHintSm90;

  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;

  static constexpr int kConsumers = Traits::kConsumers;
  static constexpr int kTileN = Traits::kTileN;

 public:
  /// The work of a warp that the producer has to spare, in a second pass.
  template <class Params>
  CUTLASS_DEVICE static void guard(Params const&, SharedStorage&) {}

  /// The work of the producer's warps when a second pass is over.
  template <class Params>
  CUTLASS_DEVICE static void restore(Params const&) {}

  /// Pingpong's opening: the last warpgroup lets the first one begin.
  CUTLASS_DEVICE static void start_turns(int warpgroup) {
    if (warpgroup == kConsumers - 1) pass_turn(warpgroup);
  }

 protected:
  /// Issues every load of one tile; load_v(block) those of a block of V. Called by one thread.
  template <class Params, class LoadV>
  CUTLASS_DEVICE static void load_tile(Params const& params, SharedStorage& shared,
                                       Pipeline& pipeline_k, PipelineState& write_k,
                                       uint32_t q_phase, typename Params::Tile const& coord,
                                       int kv_head, LoadV const& load_v) {
    using namespace cute;
    int const first_query = params.first_query(coord);
    int const batch = params.batch(coord);
    auto q = rows_of_head(params.tma_q, params.shape_q, coord.head, batch, params.row_q(coord));
    auto k = rows_of_head(params.tma_k, params.shape_k, kv_head, batch, params.row_k(coord));
    auto blocks_q = local_tile(q, Shape<Int<Traits::kWarpgroupM>, Int<Traits::kHeadDim>>{},
                               make_coord(_, _0{}));
    auto blocks_k = local_tile(k, Shape<Int<kTileN>, Int<Traits::kHeadDim>>{}, make_coord(_, _0{}));
    auto stages_k = make_tensor(make_smem_ptr(shared.k.data()), typename Traits::LayoutK{});
    auto route_k = tma_partition(params.tma_k, _0{}, Layout<_1>{}, group_modes<0, 2>(stages_k),
                                 group_modes<0, 2>(blocks_k));
    auto load_k = [&](int block) {
      pipeline_k.producer_acquire(write_k);
      copy(params.tma_k.with(*pipeline_k.producer_get_barrier(write_k), 0, Hint::EVICT_LAST),
           get<0>(route_k)(_, block), get<1>(route_k)(_, write_k.index()));
      ++write_k;
    };

    // Q comes to L2 while the last tile is still at work.
    auto query_block = [&](int i) { return max(0, first_query / Traits::kWarpgroupM + i); };
    auto remote_q = params.tma_q.get_slice(_0{}).partition_S(blocks_q);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kConsumers; ++i) {
      prefetch(params.tma_q, remote_q(_, _, _, query_block(i)));
    }

    auto const walk = key_walk<Traits>(params, coord, params.mask_of(coord), first_query);
    BlockRange const& keys = walk.places;
    int place = keys.end - 1;
    if (place >= keys.begin) load_k(walk.block(place));
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kConsumers; ++i) {
      shared.q_empty[i].wait(q_phase ^ 1);
      shared.q_full[i].arrive_and_expect_tx(Traits::kBytesQ);
      auto stage_q = make_tensor(make_smem_ptr(shared.q[i].data()), typename Traits::LayoutQ{});
      auto [from_q, to_q] = tma_partition(params.tma_q, _0{}, Layout<_1>{},
                                          group_modes<0, 2>(stage_q), group_modes<0, 2>(blocks_q));
      copy(params.tma_q.with(reinterpret_cast<uint64_t&>(shared.q_full[i]), 0, Hint::EVICT_FIRST),
           from_q(_, query_block(i)), to_q);
    }
    // K runs one block ahead of V, as the consumers use them.
    for (; place > keys.begin; --place) {
      load_k(walk.block(place - 1));
      load_v(walk.block(place));
    }
    if (place == keys.begin) load_v(walk.block(place));
  }

  static constexpr int kTurnThreads = 2 * cutlass::NumThreadsPerWarpGroup;

  CUTLASS_DEVICE static void wait_turn(int warpgroup) {
    if constexpr (Traits::kPingpong)
      sm90::barrier_sync(sm90::NamedBarrier::kTurn, warpgroup, kTurnThreads);
  }

  CUTLASS_DEVICE static void pass_turn(int warpgroup) {
    if constexpr (Traits::kPingpong) {
      int const next = warpgroup + 1 == kConsumers ? 0 : warpgroup + 1;
      sm90::barrier_arrive(sm90::NamedBarrier::kTurn, next, kTurnThreads);
    }
  }

  /// Blocks that only other warpgroups' queries see, from `block` down to `end`: nothing to
  /// compute, but stages and turns go round. Every block has a turn but one of a tile: its `last`
  /// one, where the warpgroup computes nothing.
  CUTLASS_DEVICE static void skip_blocks(int& block, int end, int last, Pipeline& pipeline_k,
                                         Pipeline& pipeline_v, PipelineState& read_k,
                                         PipelineState& read_v, int warpgroup) {
    for (; block >= end; --block) {
      pipeline_k.consumer_wait(read_k);
      release(pipeline_k, read_k);
      pipeline_v.consumer_wait(read_v);
      release(pipeline_v, read_v);
      if (block > last) {
        wait_turn(warpgroup);
        pass_turn(warpgroup);
      }
    }
  }

  /// The same behind the warpgroup's own blocks. These turns are the others' for V of the block
  /// before, and V of this block is loaded last: whoever waited for it first would hold them up.
  CUTLASS_DEVICE static void skip_last_blocks(int block, int end, Pipeline& pipeline_k,
                                              Pipeline& pipeline_v, PipelineState& read_k,
                                              PipelineState& read_v, int warpgroup) {
    for (; block >= end; --block) {
      pipeline_k.consumer_wait(read_k);
      release(pipeline_k, read_k);
      wait_turn(warpgroup);
      pass_turn(warpgroup);
      pipeline_v.consumer_wait(read_v);
      release(pipeline_v, read_v);
    }
  }

  /// Lets the producer load the warpgroup's next queries, unless the epilogue needs their memory
  /// first.
  CUTLASS_DEVICE static void release_query(SharedStorage& shared, int warpgroup) {
    if constexpr (Traits::kSeparateOutput) {
      if (cute::elect_one_sync()) shared.q_empty[warpgroup].arrive();
    }
  }

  /// One arrival a warp: a warp's own WGMMA wait says nothing of the other warps' reads.
  CUTLASS_DEVICE static void release(Pipeline& pipeline, PipelineState& state) {
    if (cute::elect_one_sync()) pipeline.consumer_release(state);
    ++state;
  }

  /// A step's K and V together. K's pipeline is one block ahead of V's, in all but the prologue and
  /// the tail.
  CUTLASS_DEVICE static void release_step(SharedStorage& shared, PipelineState& read_k,
                                          PipelineState& read_v) {
    bool const elected = cute::elect_one_sync();
    sm90::arrive_if(elected, shared.pipeline_k.empty_barrier_[read_k.index()]);
    sm90::arrive_if(elected, shared.pipeline_v.empty_barrier_[read_v.index()]);
    read_v = read_k;
    ++read_k;
  }
};

}  // namespace cute_kernels::attention
