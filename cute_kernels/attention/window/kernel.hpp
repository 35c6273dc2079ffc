#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/window/load.hpp"
#include "cute_kernels/attention/window/mainloop.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"

namespace cute_kernels::attention {

/// Warpgroup 0 moves data, the others compute. All walk the same tiles in the same order.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    window_kernel(CUTE_GRID_CONSTANT WindowParams const params) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  int const warpgroup = cutlass::canonical_warp_group_idx();

  if (threadIdx.x == 0) {
    params.prefetch_descriptors();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kQueryStages; ++i) {
      shared.q_full[i].init(1);
      shared.q_empty[i].init(Traits::kWarps);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kStages; ++i) {
      shared.kv_full[i].init(1);
      shared.kv_empty[i].init(Traits::kWarps);
      shared.kv_landed[i].init(1);
    }
    shared.passes = {};
  }
  cutlass::arch::fence_barrier_init();
  __syncthreads();
  sm90::wait_for_previous_kernel();  // it lists the tiles
  sm90::let_next_kernel_start();

  if (warpgroup == 0) {
    if constexpr (Traits::kReconfigureRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    }
    int const warp = cutlass::canonical_warp_idx_sync();
    WindowLoader<Traits> loader;
    do {
      if (warp == 0 && cute::elect_one_sync()) {
        loader.load_queries(params, shared);
      } else if (warp == 1 && cute::elect_one_sync()) {
        loader.load_keys(params, shared);
      } else if (warp == 2 && shared.passes.guarded) {
        loader.guard_values(params, shared);
      }
      __syncwarp();
    } while (shared.passes.go_on());
  } else {
    if constexpr (Traits::kReconfigureRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    }
    WindowMainloop<Traits>::compute(params, shared, warpgroup - 1);
    if (shared.passes.guarded) WindowMainloop<Traits>::restore(params);
  }
}

}  // namespace cute_kernels::attention
