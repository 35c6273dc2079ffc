#pragma once

#include <cutlass/cutlass.h>

// Arithmetic that is rounded once an operation and keeps subnormal numbers, whatever the compiler's
// options: the same bits as the CPU's.
namespace cute_kernels::sm90 {

CUTLASS_DEVICE float rounded_product(float a, float b) {
  float y;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

CUTLASS_DEVICE float rounded_sum(float a, float b) {
  float y;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

/// a - b: the negative of a subnormal b may be 0.
CUTLASS_DEVICE float rounded_difference(float a, float b) {
  float y;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace cute_kernels::sm90
