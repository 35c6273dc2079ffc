#pragma once

#include <cutlass/cutlass.h>

// A counter in global memory that puts the work of CTAs in an order.
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

}  // namespace cute_kernels::sm90
