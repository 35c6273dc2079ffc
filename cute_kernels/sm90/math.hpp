#pragma once

#include <cstdint>
#include <type_traits>

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

/// 1 / x on the same unit: 1 ulp, of infinity 0.
CUTLASS_DEVICE float reciprocal_mufu(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The larger one; NaN if one is.
CUTLASS_DEVICE float max_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

/// The smaller one; NaN if one is.
CUTLASS_DEVICE float min_nan(float a, float b) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
  return least;
}

/// Four numbers rounded to (u)int8_t and saturated, the first one in the lowest byte; NaN is 0. Two
/// instructions (F2IP), into which ptxas joins the conversions if they keep subnormals.
template <class Byte>
CUTLASS_DEVICE uint32_t round_to_bytes(float a, float b, float c, float d) {
  uint32_t bytes;
#define CUTE_KERNELS_ROUND_TO(type) \
  asm("{\n"                         \
      ".reg .s32 a, b, c, d;\n"     \
      "cvt.rni.s32.f32 a, %1;\n"    \
      "cvt.rni.s32.f32 b, %2;\n"    \
      "cvt.rni.s32.f32 c, %3;\n"    \
      "cvt.rni.s32.f32 d, %4;\n"    \
      "cvt.pack.sat." type          \
      ".s32.b32 c, d, c, 0;\n"      \
      "cvt.pack.sat." type          \
      ".s32.b32 %0, b, a, c;\n"     \
      "}"                           \
      : "=r"(bytes)                 \
      : "f"(a), "f"(b), "f"(c), "f"(d))
  if constexpr (std::is_signed_v<Byte>) {
    CUTE_KERNELS_ROUND_TO("s8");
  } else {
    CUTE_KERNELS_ROUND_TO("u8");
  }
#undef CUTE_KERNELS_ROUND_TO
  return bytes;
}

}  // namespace cute_kernels::sm90
