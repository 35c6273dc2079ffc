#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

/// What a forward kernel is told at run time. Tensors are (seqlen, head_dim, heads, batch) to TMA.
template <class Traits, class TmaQ, class TmaK, class TmaV, class TmaO>
struct ForwardParams : Traits::Calls {
  using Shape = cute::Shape<int, int, int, int>;
  TmaQ tma_q;
  TmaK tma_k;
  TmaV tma_v;
  TmaO tma_o;
  Shape shape_q;
  Shape shape_k;
  Shape shape_v;
  Shape shape_o;
  TensorView v;
  TensorView out;
  float* lse;
  float scale_log2;
  int heads;
  cutlass::FastDivmod heads_per_kv;
  typename Traits::Variant::Arguments variant;

  CUTLASS_DEVICE void prefetch_descriptors() const {
    cute::prefetch_tma_descriptor(tma_q.get_tma_descriptor());
    cute::prefetch_tma_descriptor(tma_k.get_tma_descriptor());
    cute::prefetch_tma_descriptor(tma_v.get_tma_descriptor());
    cute::prefetch_tma_descriptor(tma_o.get_tma_descriptor());
  }
};

/// The producer warpgroup of a kernel whose loads all come from one thread, of the first warp; in a
/// second pass the second one looks at some of what it has loaded.
template <class Mainloop>
class TileProducer {
  using Traits = typename Mainloop::Traits;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;

 public:
  /// Of one pass.
  template <class Params>
  CUTLASS_DEVICE void load(Params const& params, SharedStorage& shared, Pipeline& pipeline_k,
                           Pipeline& pipeline_v, int warp) {
    if (warp == 0) {
      if (cute::elect_one_sync()) {
        typename Params::Scheduler tile(params.scheduler);
        for (; tile.valid(); tile.advance()) {
          Mainloop::load(params, shared, pipeline_k, pipeline_v, write_k_, write_v_,
                         tile.phase(shared.passes), tile.coord());
        }
        shared.passes.next_first_tile = tile.round() % 2;
        shared.passes.next_first_v_stage = write_v_.index();
      }
      __syncwarp();
    } else if (warp == 1 && shared.passes.guarded) {
      Mainloop::guard(params, shared);
    }
  }

  /// When a second pass is over.
  template <class Params>
  CUTLASS_DEVICE static void restore(Params const& params) {
    Mainloop::restore(params);
  }

 private:
  PipelineState write_k_ = cutlass::make_producer_start_state<Pipeline>();
  PipelineState write_v_ = cutlass::make_producer_start_state<Pipeline>();
};

/// Warpgroup 0 moves data, the others compute. All walk the same tiles in the same order, so that
/// the barriers' phases are all they need to share.
template <class Mainloop, class Producer, class Epilogue, class Params>
__global__ void __launch_bounds__(Mainloop::Traits::kThreads, 1)
    forward_kernel(CUTE_GRID_CONSTANT Params const params) {
  using namespace cute;
  using Traits = typename Mainloop::Traits;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;
  using Scheduler = typename Params::Scheduler;

  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);

  int const warpgroup = cutlass::canonical_warp_group_idx();
  int const warp_in_group = cutlass::canonical_warp_idx_sync() % cutlass::NumWarpsPerWarpGroup;
  bool const is_producer = warpgroup == 0;

  if (threadIdx.x == 0) {
    params.prefetch_descriptors();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kConsumers; ++i) {
      shared.q_full[i].init(1);
      shared.q_empty[i].init(Traits::kQueryReleases);
    }
    if constexpr (Traits::kSharedOutput) shared.o_empty.init(1);
    shared.passes = {};
  }
  typename Pipeline::Params pipeline_params;
  pipeline_params.role =
      is_producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  pipeline_params.is_leader = is_producer;
  pipeline_params.num_consumers =
      Traits::kConsumers * cutlass::NumWarpsPerWarpGroup;  // one arrival a warp
  pipeline_params.transaction_bytes = Traits::kBytesK;
  Pipeline pipeline_k(shared.pipeline_k, pipeline_params, Shape<_1, _1, _1>{});
  pipeline_params.transaction_bytes = Traits::kBytesV;
  Pipeline pipeline_v(shared.pipeline_v, pipeline_params, Shape<_1, _1, _1>{});
  Mainloop::prepare(shared);
  cutlass::arch::fence_barrier_init();
  __syncthreads();

  if (is_producer) {
    if constexpr (Traits::kReconfigureRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    }
    Producer producer;
    do {
      producer.load(params, shared, pipeline_k, pipeline_v, warp_in_group);
    } while (shared.passes.go_on());
    if (shared.passes.guarded) producer.restore(params);
  } else {
    if constexpr (Traits::kReconfigureRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    }
    int const consumer = warpgroup - 1;
    Mainloop::start_turns(consumer);
    PipelineState read_k, read_v;
    do {
      for (Scheduler tile(params.scheduler); tile.valid(); tile.advance()) {
        auto const coord = tile.coord();
        Mainloop::compute_tile(params, shared, pipeline_k, pipeline_v, read_k, read_v,
                               tile.phase(shared.passes), coord, consumer,
                               [&](auto const& softmax, auto const& out) {
                                 Epilogue::store(params, shared, coord, consumer, softmax, out);
                               });
      }
      Epilogue::drain();  // a second pass writes there again
    } while (shared.passes.go_on());
  }
}

}  // namespace cute_kernels::attention
