#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

/// Starts a forward kernel, a CTA for each multiprocessor or for each tile. With `overlaps` while
/// the kernel before it on the stream ends: then it waits for that one itself.
template <class Traits, class Params>
cudaError_t start_forward(void (*kernel)(Params), Params const& params, Device const& device,
                          cudaStream_t stream, bool overlaps = false) {
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory");
  // Cheap (well under a microsecond) and per device; remembering it would need a table of devices.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  int const grid = params.scheduler.tiles < device.multiprocessors ? params.scheduler.tiles
                                                                   : device.multiprocessors;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace cute_kernels::attention
