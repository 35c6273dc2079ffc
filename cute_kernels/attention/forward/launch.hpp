#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/forward/mainloop.hpp"
#include "cute_kernels/attention/forward/start.hpp"
#include "cute_kernels/attention/forward/traits.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"

namespace cute_kernels::attention {

template <class Tile>
int64_t forward_workspace_bytes(ForwardProblem const& problem) {
  using Traits = ForwardTraits<Tile>;
  return work_bytes<Traits>(problem) + shared_mask_bytes<Traits>(problem);
}

/// Starts the forward kernel of a tile on `stream`: TMA descriptors, grid, launch; before it, where
/// the kernel takes any call, the one that prepares its work. Asynchronous.
template <class Tile>
cudaError_t launch_forward(ForwardProblem const& problem, cudaStream_t stream) {
  using Traits = ForwardTraits<Tile>;
  AttentionCall const& call = problem.call;
  if (Traits::Variant::kHasBlockMask && !has_block_lists(problem)) return cudaErrorInvalidValue;
  float const scale_log2 = scale_of_scores(Traits::Variant::unit(call)) * sm90::kLog2e;
  auto params = forward_params<Traits>(problem, scale_log2);
  if constexpr (shares_mask<typename Traits::Variant>()) {
    params.variant.shared_mask = shared_mask_of<Traits>(problem);
  }
  if constexpr (Traits::kAnyCall) {
    cudaError_t const status = start_listing_work<Traits>(problem, stream);
    if (status != cudaSuccess) return status;
  }
  return start_forward<ForwardMainloop<Traits>>(params, problem, stream, Traits::kAnyCall);
}

}  // namespace cute_kernels::attention
