#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/forward/mainloop.hpp"
#include "cute_kernels/attention/forward/start.hpp"
#include "cute_kernels/attention/forward/traits.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"

namespace cute_kernels::attention {

/// Starts the forward kernel of a tile on `stream`: TMA descriptors, grid, launch. Asynchronous.
template <class Tile>
cudaError_t launch_forward(ForwardProblem const& problem, cudaStream_t stream) {
  using Traits = ForwardTraits<Tile>;
  float const scale_log2 = scale_of_scores(problem.call.scale) * sm90::kLog2e;
  return start_forward<ForwardMainloop<Traits>>(forward_params<Traits>(problem, scale_log2),
                                                problem.device, stream);
}

}  // namespace cute_kernels::attention
