#pragma once

#include <cuda_runtime_api.h>

#include "cute_kernels/fp8/problem.hpp"

// The compiled launcher of quantize.hpp. Nothing here needs a CUDA compiler.
namespace cute_kernels::fp8 {

/// Kernels that start while the one before them ends. What is launched afterwards as usual waits
/// for all of them.
cudaError_t launch_quantize(QuantizeProblem const& problem, cudaStream_t stream);

/// Adds `count` floats to others.
cudaError_t launch_add(float* to, float const* from, int64_t count, int device,
                       cudaStream_t stream);

}  // namespace cute_kernels::fp8
