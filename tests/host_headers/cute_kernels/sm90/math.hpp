#pragma once

#include <cmath>

#include <cutlass/cutlass.h>

// The functions of cute_kernels/sm90/math.hpp, which are instructions there.
namespace cute_kernels::sm90 {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

inline float exp2_mufu(float x) { return std::exp2(x); }
inline float reciprocal_mufu(float x) { return 1.f / x; }
inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }

}  // namespace cute_kernels::sm90
