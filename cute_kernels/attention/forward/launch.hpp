#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/forward/mainloop.hpp"
#include "cute_kernels/attention/forward/start.hpp"
#include "cute_kernels/attention/forward/traits.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"

namespace cute_kernels::attention {

/// The memory that a launch needs: that of the work list.
template <class Tile>
int64_t forward_workspace_bytes(ForwardProblem const& problem) {
  using Traits = ForwardTraits<Tile>;
  if constexpr (!Traits::kAnyCall) return 0;
  return work_list_bytes(problem.call.sizes.batch, most_work<Traits>(problem.call));
}

/// Starts the forward kernel of a tile on `stream`: TMA descriptors, grid, launch; before it, where
/// the kernel takes any call, the one that prepares its work. Asynchronous.
template <class Tile>
cudaError_t launch_forward(ForwardProblem const& problem, cudaStream_t stream) {
  using Traits = ForwardTraits<Tile>;
  AttentionCall const& call = problem.call;
  float const scale_log2 = scale_of_scores(Traits::Variant::unit(call)) * sm90::kLog2e;
  auto const params = forward_params<Traits>(problem, scale_log2);
  if constexpr (Traits::kAnyCall) {
    int64_t const row_bytes =
        int64_t{sizeof(typename Traits::Output)} * call.sizes.heads_q * call.sizes.head_dim_v;
    UnusedRows const unused{problem.out.data, row_bytes, problem.lse, call.sizes.heads_q};
    cudaError_t const status = start_preparing<typename Traits::Tiling>(
        call, forward_work_list<Traits>(problem), unused, problem.device, stream);
    if (status != cudaSuccess) return status;
  }
  return start_forward<ForwardMainloop<Traits>>(params, problem, stream, Traits::kAnyCall);
}

}  // namespace cute_kernels::attention
