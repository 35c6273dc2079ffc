#pragma once

#include <cutlass/cutlass.h>

namespace cute_kernels::sm90 {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

/// 2^x on the special function unit (16 results a clock and SM): 2 ulp, subnormal results flushed
/// to zero, 2^-inf = 0.
CUTLASS_DEVICE float exp2_mufu(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cute_kernels::sm90
