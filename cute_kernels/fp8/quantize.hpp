#pragma once

#include <cstdint>
#include <type_traits>

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/sm90/math.hpp"

// What the kernels that quantise have in common. Their arithmetic is that of
// python/cute_kernels/fp8, to the bit.
namespace cute_kernels::fp8 {

inline constexpr float kSaturation = 0x1p48f;        // scores of saturated inputs are still finite
inline constexpr float kSmallestMaximum = 0x1p-60f;  // scales and their inverses are finite

template <class Element>
inline constexpr float kLargest = 448.f;
template <>
inline constexpr float kLargest<int8_t> = 127.f;

/// Of kBlockRows rows, each with a scale.
CUTLASS_HOST_DEVICE int blocks_of_rows(int seqlen) { return (seqlen - 1) / kBlockRows + 1; }

/// Clamps to +-kSaturation; NaN stays NaN.
CUTLASS_DEVICE float saturate(float x) {
  return x > kSaturation ? kSaturation : x < -kSaturation ? -kSaturation : x;
}

/// The two elements of a word.
template <class In>
CUTLASS_DEVICE float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<In, cutlass::bfloat16_t>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return __half22float2(reinterpret_cast<__half2 const&>(word));
  }
}

/// Four elements rounded to 8 bits, saturated. NaN stays NaN, or is 0 in int8.
template <class Out>
CUTLASS_DEVICE uint32_t round_to(float a, float b, float c, float d) {
  if constexpr (std::is_same_v<Out, int8_t>) {
    return sm90::round_to_bytes<int8_t>(a, b, c, d);
  } else {
    auto const rounded =
        cutlass::NumericArrayConverter<Out, float, 4>{}(cutlass::Array<float, 4>{a, b, c, d});
    return reinterpret_cast<uint32_t const&>(rounded);
  }
}

/// The end of the grid is that of the one before it in its Chain, too: its last CTA waits for it.
CUTLASS_DEVICE void end_after_previous() {
  if (blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1 && blockIdx.z == gridDim.z - 1) {
    cudaGridDependencySynchronize();
  }
}

}  // namespace cute_kernels::fp8
