#pragma once

#include <cutlass/arch/barrier.h>

namespace cute_kernels::sm90 {

/// So many of a barrier's arrivals, by one thread.
CUTLASS_DEVICE void arrive(cutlass::arch::ClusterBarrier const& barrier, int count) {
  uint32_t const address = cute::cast_smem_ptr_to_uint(&barrier);
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(count)
               : "memory");
}

/// The compiler moves no access to memory across.
CUTLASS_DEVICE void wait_memory(cutlass::arch::ClusterBarrier const& barrier, uint32_t phase) {
  barrier.wait(phase);
  asm volatile("" ::: "memory");
}

}  // namespace cute_kernels::sm90
