#pragma once

#include <atomic>

#include <cuda_runtime.h>

namespace cute_kernels::sm90 {

/// How a kernel is launched.
struct Launch {
  dim3 grid;
  int threads;
  cudaStream_t stream;
  int device;             // the stream's, and the current one
  int shared_bytes = 0;   // dynamic, the same for every launch of a kernel
  dim3 cluster{1, 1, 1};  // neighbouring CTAs that run together
  /// The kernel may start before the one before it on the stream has ended, for which it then waits
  /// itself (dependent_launch.hpp).
  bool early = false;
};

/// Lets a kernel have more than the 48 KB of shared memory that all have. Remembered for each
/// device, because asking costs a small call 2 microseconds, a tenth of its host time.
template <auto kKernel>
cudaError_t allow_shared_bytes(Launch const& how) {
  constexpr int kForAll = 48 * 1024;
  constexpr int kDevices = 128;
  static std::atomic<bool> allowed[kDevices];
  bool const is_remembered = how.device >= 0 && how.device < kDevices;
  if (how.shared_bytes <= kForAll) return cudaSuccess;
  if (is_remembered && allowed[how.device].load(std::memory_order_relaxed)) return cudaSuccess;
  cudaError_t const status =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
  if (is_remembered && status == cudaSuccess) {
    allowed[how.device].store(true, std::memory_order_relaxed);
  }
  return status;
}

template <auto kKernel, class... Parameters>
cudaError_t launch_kernel(Launch const& how, Parameters const&... arguments) {
  cudaError_t const status = allow_shared_bytes<kKernel>(how);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (how.early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster.x * how.cluster.y > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {how.cluster.x, how.cluster.y, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

}  // namespace cute_kernels::sm90
