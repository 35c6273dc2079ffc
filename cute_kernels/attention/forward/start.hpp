#pragma once

#include <algorithm>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::attention {

/// Starts a forward kernel, a CTA for each multiprocessor or for each tile. With `overlaps` while
/// the kernel before it on the stream ends: then it waits for that one itself.
template <class Traits, auto kKernel, class Params>
cudaError_t start_forward(Params const& params, Device const& device, cudaStream_t stream,
                          bool overlaps = false) {
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory");
  sm90::Launch how{};
  how.grid = dim3(std::min(params.scheduler.tiles, device.multiprocessors));
  how.threads = Traits::kThreads;
  how.stream = stream;
  how.device = device.index;
  how.shared_bytes = kSharedBytes;
  how.early = overlaps;
  return sm90::launch_kernel<kKernel>(how, params);
}

}  // namespace cute_kernels::attention
