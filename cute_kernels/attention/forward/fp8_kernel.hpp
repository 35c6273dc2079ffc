#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/epilogue.hpp"
#include "cute_kernels/attention/forward/fp8_mainloop.hpp"
#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/attention/forward/kernel.hpp"
#include "cute_kernels/attention/fp8_problem.hpp"

namespace cute_kernels::attention {

/// What an FP8 forward kernel is told at run time beside what every forward kernel is. To TMA, V is
/// (head_dim, keys, heads, batch).
template <class Traits, class TmaQ, class TmaK, class TmaV, class TmaO>
struct Fp8ForwardParams : ForwardParams<Traits, TmaQ, TmaK, TmaV, TmaO> {
  ScaleView q_scale;
  ScaleView k_scale;
  ScaleView v_scale;
  int head_dim;
  bool out_float16;
};

/// Warpgroup 0 moves data, the others compute; see forward_kernel.
template <class Traits, class Params>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    fp8_forward_kernel(CUTE_GRID_CONSTANT Params const params) {
  using namespace cute;
  using Mainloop = Fp8ForwardMainloop<Traits>;
  using Epilogue = ForwardEpilogue<typename Traits::Epilogue>;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;

  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);

  int const warpgroup = cutlass::canonical_warp_group_idx();
  int const warp_in_group = cutlass::canonical_warp_idx_sync() % cutlass::NumWarpsPerWarpGroup;
  bool const is_producer = warpgroup == 0;

  if (threadIdx.x == 0) {
    prefetch_tma_descriptor(params.tma_q.get_tma_descriptor());
    prefetch_tma_descriptor(params.tma_k.get_tma_descriptor());
    prefetch_tma_descriptor(params.tma_v.get_tma_descriptor());
    prefetch_tma_descriptor(params.tma_o.get_tma_descriptor());
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kConsumers; ++i) {
      shared.q_full[i].init(1);
      shared.q_empty[i].init(Traits::kQueryReleases);
    }
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
  Mainloop::write_ones(shared);
  cutlass::arch::fence_barrier_init();
  __syncthreads();

  uint32_t q_phase = 0;
  if (is_producer) {
    if constexpr (Traits::kReconfigureRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    }
    if (warp_in_group == 0 && elect_one_sync()) {
      PipelineState write_k = cutlass::make_producer_start_state<Pipeline>();
      PipelineState write_v = cutlass::make_producer_start_state<Pipeline>();
      for (TileScheduler tile(params.scheduler); tile.valid(); tile.advance()) {
        Mainloop::load(params, shared, pipeline_k, pipeline_v, write_k, write_v, q_phase,
                       tile.coord());
        q_phase ^= 1;
      }
    }
  } else {
    if constexpr (Traits::kReconfigureRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    }
    int const consumer = warpgroup - 1;
    Mainloop::start_turns(consumer);
    PipelineState read_k, read_v;
    for (TileScheduler tile(params.scheduler); tile.valid(); tile.advance()) {
      TileCoord const coord = tile.coord();
      typename Mainloop::Softmax softmax;
      auto out = partition_fragment_C(
          typename Traits::MmaPv{}, Shape<Int<Traits::kWarpgroupM>, Int<Traits::kValueChannels>>{});
      clear(out);
      Mainloop::load_value_scales(params, shared, coord, consumer);
      Mainloop::compute(params, shared, pipeline_k, pipeline_v, read_k, read_v, q_phase, coord,
                        consumer, softmax, out);
      auto values = Mainloop::without_ones(out);
      auto rows = make_tensor(values.data(), sm90::accumulator_rows_cols(values.layout()));
      softmax.finalize(rows);
      Mainloop::scale_values(shared, consumer, rows);
      Epilogue::store(params, shared, coord, consumer, softmax,
                      Mainloop::round_output(params, values));
      q_phase ^= 1;
    }
    Epilogue::drain();
  }
}

}  // namespace cute_kernels::attention
