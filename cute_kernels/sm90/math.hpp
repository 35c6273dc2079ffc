#pragma once

#include <cutlass/cutlass.h>

namespace cute_kernels::sm90 {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Minimax fit of 2^f - 1 = c1 f + c2 f^2 + c3 f^3 on [-1/2, 1/2], by relative error of 2^f.
inline constexpr float kExp2C1 = 0.693282927f;
inline constexpr float kExp2C2 = 0.24221096f;
inline constexpr float kExp2C3 = 0.0550089294f;
inline constexpr float kExp2FmaError = 1.1e-4f;

/// 2^x on the special function unit (16 results a clock and SM): 2 ulp, subnormal results flushed
/// to zero, 2^-inf = 0.
CUTLASS_DEVICE float exp2_mufu(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 2^x on the FMA pipes, for -inf <= x < 127: relative error below kExp2FmaError, 0 for x <= -127.
/// 2^x = 2^n 2^f with n = round(x), f in [-1/2, 1/2]; 2^f by a polynomial, n added to its exponent
/// as an integer.
CUTLASS_DEVICE float exp2_fma(float x) {
  // Adding 1.5 * 2^23 leaves n in the low bits of the sum. The polynomial is exactly 1 at 0, so
  // that n = -127 turns its exponent into 0 and gives 0.
  constexpr float kRound = 12582912.f;
  x = fmaxf(x, -127.f);
  float const shifted = x + kRound;
  float const f = x - (shifted - kRound);
  float const p = fmaf(fmaf(fmaf(kExp2C3, f, kExp2C2), f, kExp2C1), f, 1.f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

}  // namespace cute_kernels::sm90
