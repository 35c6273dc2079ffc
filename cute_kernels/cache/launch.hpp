#pragma once

#include <cuda_runtime_api.h>

#include "cute_kernels/cache/problem.hpp"

// The compiled launchers of append.hpp. Nothing here needs a CUDA compiler. The kernels start while
// what comes before them on the stream ends, and let the next one start early.
namespace cute_kernels::cache {

cudaError_t launch_append(AppendProblem const& problem, attention::Device const& device,
                          cudaStream_t stream);
cudaError_t launch_rotate(RotateProblem const& problem, attention::Device const& device,
                          cudaStream_t stream);

}  // namespace cute_kernels::cache
