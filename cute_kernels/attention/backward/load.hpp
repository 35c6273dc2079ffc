#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"

namespace cute_kernels::attention {

/// Issues every load: K and V once a key block, Q with its statistics and dO for each step.
/// Of one thread.
template <class Traits, class Params>
class BackwardLoader {
  using KeyBlock = typename Traits::KeyBlock;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;

 public:
  CUTLASS_DEVICE BackwardLoader(Params const& params, SharedStorage& shared, Pipeline& pipeline_q,
                                Pipeline& pipeline_grad_out)
      : params_(params),
        shared_(shared),
        pipeline_q_(pipeline_q),
        pipeline_grad_out_(pipeline_grad_out) {}

  CUTLASS_DEVICE void load(KeyBlock const& coord) {
    using namespace cute;
    KeyBlockSteps<Traits, Params, Caller::kThread> const steps(params_, coord);
    if (Traits::kAnyCall && !steps.any()) {
      sm90::wait_for_previous_kernel();  // so does every CTA, for the kernel behind this one
      return;
    }
    // Not of keys that nobody loads: consumers, who wait for none, could be a phase ahead of this.
    if constexpr (Traits::kPersistent) {
      prefetch_keys(coord);
      shared_.keys_empty.wait(keys_phase_);
      keys_phase_ ^= 1;
    }
    shared_.k_full.arrive_and_expect_tx(sizeof(shared_.k));
    load_keys(params_.tma_k, shared_.k.data(), typename Traits::LayoutK{}, coord,
              make_coord(coord.n_block, _0{}), shared_.k_full);
    if constexpr (Traits::kCluster == 2) {  // and half of the other CTA's K
      shared_.peer_k_full.arrive_and_expect_tx(sizeof(shared_.own));
      load_keys(params_.tma_k, shared_.own.data(), typename Traits::LayoutPeerK{}, coord,
                make_coord(coord.n_block ^ 1, Traits::rank(coord.n_block)), shared_.peer_k_full);
    }
    sm90::wait_for_previous_kernel();  // it writes the statistics
    bool v_pending = true;
    for (auto step = steps.first(); step.valid(); step.advance()) {
      auto* full = load_queries(params_.tma_q, shared_.q.data(), typename Traits::LayoutQ{},
                                pipeline_q_, write_q_, step, coord);
      auto const* statistics =
          static_cast<typename Traits::Statistics const*>(params_.workspace.statistics);
      SM90_BULK_COPY_G2S::copy(statistics + step.block_index(), full,
                               &shared_.statistics[write_q_.index()], sizeof(*statistics));
      ++write_q_;
      if (v_pending) load_v(coord);
      v_pending = false;
      load_queries(params_.tma_grad_out, shared_.grad_out.data(), typename Traits::LayoutGradOut{},
                   pipeline_grad_out_, write_grad_out_, step, coord);
      ++write_grad_out_;
    }
  }

 private:
  /// K and V to L2, while consumers are still at the last key block's steps: all CTAs of one length
  /// end together, and then wait for memory together.
  CUTLASS_DEVICE void prefetch_keys(KeyBlock const& coord) {
    using namespace cute;
    constexpr int kParts = Traits::kTileN / Traits::kWarpgroupN;
    auto prefetch_rows = [&](auto const& tma, auto layout, auto const& where) {
      auto keys = local_tile(rows_of_head(tma, params_.shape_k, coord.kv_head, coord.tma_k()),
                             make_shape(size<0>(layout), size<1>(layout)), where);
      auto tile = make_tensor(make_smem_ptr(shared_.k.data()), layout);  // not written
      auto [from, to] = tma_partition(tma, _0{}, cute::Layout<_1>{}, group_modes<0, 2>(tile),
                                      group_modes<0, 2>(keys));
      prefetch(tma, from);
    };
    prefetch_rows(params_.tma_k, typename Traits::LayoutK{}, make_coord(coord.n_block, _0{}));
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      prefetch_rows(params_.tma_v, typename Traits::LayoutV{},
                    make_coord(coord.n_block * kParts + part, _0{}));
    }
  }

  CUTLASS_DEVICE void load_v(KeyBlock const& coord) {
    using namespace cute;
    constexpr int kParts = Traits::kTileN / Traits::kWarpgroupN;
    shared_.v_full.arrive_and_expect_tx(sizeof(shared_.v));
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      load_keys(params_.tma_v, shared_.v[part], typename Traits::LayoutV{}, coord,
                make_coord(coord.n_block * kParts + part, _0{}), shared_.v_full);
    }
  }

  template <class Tma, class Layout, class Where>
  CUTLASS_DEVICE void load_keys(Tma const& tma, typename Traits::Element* buffer, Layout layout,
                                KeyBlock const& coord, Where const& where,
                                cutlass::arch::ClusterTransactionBarrier& full) {
    using namespace cute;
    auto keys = local_tile(rows_of_head(tma, params_.shape_k, coord.kv_head, coord.tma_k()),
                           make_shape(size<0>(layout), size<1>(layout)), where);
    auto tile = make_tensor(make_smem_ptr(buffer), layout);
    auto [from, to] = tma_partition(tma, _0{}, cute::Layout<_1>{}, group_modes<0, 2>(tile),
                                    group_modes<0, 2>(keys));
    copy(tma.with(reinterpret_cast<uint64_t&>(full)), from, to);
  }

  /// Returns the stage's barrier, to which what else is loaded with it arrives.
  template <class Tma, class Layout>
  CUTLASS_DEVICE uint64_t* load_queries(Tma const& tma, typename Traits::Element* buffer,
                                        Layout layout, Pipeline& pipeline,
                                        PipelineState const& write,
                                        QuerySteps<Traits, Params> const& step,
                                        KeyBlock const& coord) {
    using namespace cute;
    auto queries =
        local_tile(rows_of_head(tma, params_.shape_q, step.head(), coord.tma_q()),
                   make_shape(size<0>(layout), size<1>(layout)), make_coord(step.block(), _0{}));
    auto stages = make_tensor(make_smem_ptr(buffer), layout);
    auto [from, to] = tma_partition(tma, _0{}, cute::Layout<_1>{}, group_modes<0, 2>(stages),
                                    group_modes<0, 2>(queries));
    pipeline.producer_acquire(write);
    auto* full = pipeline.producer_get_barrier(write);
    copy(tma.with(*full), from, to(_, write.index()));
    return full;
  }

  Params const& params_;
  SharedStorage& shared_;
  Pipeline& pipeline_q_;
  Pipeline& pipeline_grad_out_;
  PipelineState write_q_ = cutlass::make_producer_start_state<Pipeline>();
  PipelineState write_grad_out_ = cutlass::make_producer_start_state<Pipeline>();
  uint32_t keys_phase_ = 1;
};

}  // namespace cute_kernels::attention
