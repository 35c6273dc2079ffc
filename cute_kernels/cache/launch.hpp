#pragma once

#include <cuda_runtime_api.h>

#include "cute_kernels/cache/fp8_problem.hpp"
#include "cute_kernels/cache/problem.hpp"

// The compiled launchers of append.hpp and fp8_append.hpp. Nothing here needs a CUDA compiler.
namespace cute_kernels::cache {

/// One kernel, which starts while what comes before it on the stream ends, and lets the next one
/// start early.
cudaError_t launch_append(AppendProblem const& problem, attention::Device const& device,
                          cudaStream_t stream);
cudaError_t launch_fp8_append(Fp8AppendProblem const& problem, attention::Device const& device,
                              cudaStream_t stream);

}  // namespace cute_kernels::cache
