#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::binding {

/// The facts about GPU `index`, asked from the driver once. Throws if the driver is too old for
/// this build, and if the GPU has another compute capability than 9.0.
attention::Device const& hopper(int index);

/// The same as a call sees it that leaves some of its multiprocessors alone. Throws if sm_margin is
/// below 0.
attention::Device hopper(int index, int64_t sm_margin);

/// PyTorch's current stream on GPU `index`.
cudaStream_t current_stream(int index);

/// Throws if `status` is an error, saying what failed.
void require_success(cudaError_t status, char const* what);

}  // namespace cute_kernels::binding
