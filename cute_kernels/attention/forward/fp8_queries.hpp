#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// Makes rows of the warpgroup's queries 0 from the first one on that its sequence does not have:
/// what lies there is another sequence's, or nobody's and written by none. A row that moves its
/// origin moves those of its warp, so that results would depend on it, if only in their last bits.
/// Of the whole warpgroup, when its queries have landed.
template <class Traits>
CUTLASS_DEVICE void clear_unused_queries(typename Traits::SharedStorage& shared, int warpgroup,
                                         int first_row) {
  using namespace cute;
  constexpr int kChunk = sizeof(uint4) / sizeof(typename Traits::ElementQk);
  constexpr int kChunks = Traits::kHeadDim / kChunk;
  if (first_row <= 0 || first_row >= Traits::kWarpgroupM) return;
  auto queries = make_tensor(make_smem_ptr(shared.q[warpgroup].data()), typename Traits::LayoutQ{});
  int const chunks = (Traits::kWarpgroupM - first_row) * kChunks;
#pragma unroll 1  // seldom run; unrolled, it takes registers from the steps
  for (int i = threadIdx.x % cutlass::NumThreadsPerWarpGroup; i < chunks;
       i += cutlass::NumThreadsPerWarpGroup) {
    auto& chunk = queries(first_row + i / kChunks, i % kChunks * kChunk);
    reinterpret_cast<uint4&>(chunk) = uint4{};
  }
  cutlass::arch::fence_view_async_shared();
  sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup, cutlass::NumThreadsPerWarpGroup);
}

}  // namespace cute_kernels::attention
