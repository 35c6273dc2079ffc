#pragma once

#include <cutlass/cutlass.h>

// A counter in global memory that puts the work of CTAs in an order.
namespace cute_kernels::sm90 {

/// Waits until the counter says `value`, and sees what those before have written.
CUTLASS_DEVICE void semaphore_wait(int const* counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen != value);
  asm volatile("fence.proxy.async;" ::: "memory");
}

/// Lets the next one in.
CUTLASS_DEVICE void semaphore_advance(int* counter) {
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace cute_kernels::sm90
