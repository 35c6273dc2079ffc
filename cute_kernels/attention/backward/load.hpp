#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"

namespace cute_kernels::attention {

/// Issues every load of a CTA: K and V once, Q with its lse and dO with its delta for each step.
/// Called by one thread.
template <class Traits, class Params>
CUTLASS_DEVICE void load_backward(Params const& params, typename Traits::SharedStorage& shared,
                                  typename Traits::Pipeline& pipeline_q,
                                  typename Traits::Pipeline& pipeline_grad_out,
                                  KeyBlockCoord const& coord) {
  using namespace cute;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;

  auto load_keys = [&](auto const& tma, auto& buffer, auto layout, auto const& where, auto& full) {
    auto keys = local_tile(tma.get_tma_tensor(params.shape_k)(_, _, coord.kv_head, coord.batch),
                           make_shape(size<0>(layout), size<1>(layout)), where);
    auto tile = make_tensor(make_smem_ptr(buffer.data()), layout);
    auto [from, to] =
        tma_partition(tma, _0{}, Layout<_1>{}, group_modes<0, 2>(tile), group_modes<0, 2>(keys));
    full.arrive_and_expect_tx(size(layout) * sizeof(typename Traits::Element));
    copy(tma.with(reinterpret_cast<uint64_t&>(full)), from, to);
  };
  auto load_queries = [&](auto const& tma, auto& buffer, float const* rows, auto& row_stages,
                          Pipeline& pipeline, PipelineState& write,
                          QuerySteps<Traits, Params> const& step) {
    auto queries = local_tile(tma.get_tma_tensor(params.shape_q)(_, _, step.head(), coord.batch),
                              Shape<Int<Traits::kTileM>, Int<Traits::kHeadDim>>{},
                              make_coord(step.block(), _0{}));
    auto stages = make_tensor(make_smem_ptr(buffer.data()), typename Traits::LayoutQ{});
    auto [from, to] = tma_partition(tma, _0{}, Layout<_1>{}, group_modes<0, 2>(stages),
                                    group_modes<0, 2>(queries));
    pipeline.producer_acquire(write);
    auto* full = pipeline.producer_get_barrier(write);
    copy(tma.with(*full), from, to(_, write.index()));
    SM90_BULK_COPY_G2S::copy(rows + step.block_index() * Traits::kTileM, full,
                             row_stages[write.index()], Traits::kBytesRows);
    ++write;
  };

  PipelineState write_q = cutlass::make_producer_start_state<Pipeline>();
  PipelineState write_grad_out = cutlass::make_producer_start_state<Pipeline>();
  auto const own_keys = make_coord(coord.n_block, _0{});
  load_keys(params.tma_k, shared.k, typename Traits::LayoutK{}, own_keys, shared.k_full);
  if constexpr (Traits::kCluster == 2) {  // and half of the other CTA's K
    load_keys(params.tma_k, shared.own, typename Traits::LayoutPeerK{},
              make_coord(coord.n_block ^ 1, Traits::rank(coord.n_block)), shared.peer_k_full);
  }
  sm90::wait_for_previous_kernel();  // it writes lse and delta
  bool v_pending = true;
  for (QuerySteps<Traits, Params> step(params, coord); step.valid(); step.advance()) {
    load_queries(params.tma_q, shared.q, params.workspace.lse_log2, shared.lse_log2, pipeline_q,
                 write_q, step);
    if (v_pending) {
      load_keys(params.tma_v, shared.v, typename Traits::LayoutK{}, own_keys, shared.v_full);
    }
    v_pending = false;
    load_queries(params.tma_grad_out, shared.grad_out, params.workspace.minus_delta,
                 shared.minus_delta, pipeline_grad_out, write_grad_out, step);
  }
}

}  // namespace cute_kernels::attention
