#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

/// Starts a forward kernel, a CTA for each multiprocessor or for each tile.
template <class Traits, class Params>
cudaError_t start_forward(void (*kernel)(Params), Params const& params, Device const& device,
                          cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory");
  // Cheap (well under a microsecond) and per device; remembering it would need a table of devices.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  int const grid = params.scheduler.tiles < device.multiprocessors ? params.scheduler.tiles
                                                                   : device.multiprocessors;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace cute_kernels::attention
