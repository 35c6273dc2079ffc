#pragma once

#include <cutlass/cutlass.h>
#include <cute/arch/util.hpp>

// Counters: one in global memory puts the work of CTAs in an order, one in shared memory says how
// far some threads are.
namespace cute_kernels::sm90 {

/// Waits until the counter says `value`, and sees what those before have written, as TMA does.
CUTLASS_DEVICE void semaphore_wait(int const* counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen != value);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

/// Lets the next one in. What TMA has written is seen if its completion has been waited for, which
/// needs no fence.
CUTLASS_DEVICE void semaphore_advance(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

/// Adds 1 to a counter in shared memory, after what the thread has done before.
CUTLASS_DEVICE void count_up(int* counter) {
  asm volatile(
      "red.release.cta.shared::cta.add.s32 [%0], 1;" ::"r"(cute::cast_smem_ptr_to_uint(counter))
      : "memory");
}

/// Waits until the counter has come to `value`.
CUTLASS_DEVICE void wait_for_count(int const* counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];"
                 : "=r"(seen)
                 : "r"(cute::cast_smem_ptr_to_uint(counter))
                 : "memory");
  } while (seen < value);
}

}  // namespace cute_kernels::sm90
