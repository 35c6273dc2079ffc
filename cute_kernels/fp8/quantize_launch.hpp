#pragma once

#include <cuda_runtime_api.h>

#include "cute_kernels/fp8/problem.hpp"

// The compiled launchers of quantize.hpp. Nothing here needs a CUDA compiler.
namespace cute_kernels::fp8 {

enum class InputType { kFloat16, kBFloat16, kE4m3 };

cudaError_t launch_quantize_rows(QuantizeRowsProblem const& problem, InputType in, bool to_int8,
                                 cudaStream_t stream);
cudaError_t launch_quantize_values(QuantizeValuesProblem const& problem, InputType in,
                                   cudaStream_t stream);
cudaError_t launch_key_mean(KeyMeanProblem const& problem, InputType in, cudaStream_t stream);

}  // namespace cute_kernels::fp8
