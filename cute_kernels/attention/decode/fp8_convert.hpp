#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <cutlass/numeric_conversion.h>

// Numbers of 8 bits as float16, which has all of them.
namespace cute_kernels::attention {

/// Four e4m3 numbers; NaN stays NaN.
CUTLASS_DEVICE uint2 halves_of_e4m3(uint32_t bytes) {
  using Bytes = cutlass::Array<cutlass::float_e4m3_t, 4>;
  auto const halves = cutlass::NumericArrayConverter<cutlass::half_t, cutlass::float_e4m3_t, 4>{}(
      reinterpret_cast<Bytes const&>(bytes));
  return reinterpret_cast<uint2 const&>(halves);
}

/// Bit 0 of a byte: whether it is NaN, all of whose bits but the sign are ones.
CUTLASS_DEVICE uint32_t nan_of_e4m3(uint32_t bytes) {
  return ((bytes & 0x7f7f7f7fu) + 0x01010101u) >> 7 & 0x01010101u;
}

/// Four int8 numbers: x + 128 in the last bits of 1024, whose next numbers are 1 apart.
template <bool kCrossed>
CUTLASS_DEVICE uint2 halves_of_int8(uint32_t bytes) {
  uint32_t const shifted = bytes ^ 0x80808080u;
  __half2 const origin = __float2half2_rn(1024.f + 128.f);
  auto pair = [&](uint32_t selector) {
    uint32_t const raised = __byte_perm(shifted, 0x64646464u, selector);
    __half2 const x = __hsub2(reinterpret_cast<__half2 const&>(raised), origin);
    return reinterpret_cast<uint32_t const&>(x);
  };
  return kCrossed ? uint2{pair(0x4240), pair(0x4341)} : uint2{pair(0x4140), pair(0x4342)};
}

inline constexpr float kRaisedUnit = 1.f / (1 << 24);  // float16's smallest number

/// Four int8 numbers x as kRaisedUnit (x + 128): subnormal, with the bits of x + 128.
CUTLASS_DEVICE uint2 raised_halves_of_int8(uint32_t bytes) {
  uint32_t const raised = bytes ^ 0x80808080u;
  return {__byte_perm(raised, 0, 0x4140), __byte_perm(raised, 0, 0x4342)};
}

/// Four of either. With kCrossed bytes 0 and 2 are the first pair, 1 and 3 the second.
template <bool kInt8, bool kCrossed = false>
CUTLASS_DEVICE uint2 halves_of(uint32_t bytes) {
  if constexpr (kInt8) return halves_of_int8<kCrossed>(bytes);
  return halves_of_e4m3(kCrossed ? __byte_perm(bytes, 0, 0x3120) : bytes);
}

/// Eight of either, in their order.
template <bool kInt8>
CUTLASS_DEVICE uint4 halves_of_run(uint2 bytes) {
  uint2 const low = halves_of<kInt8>(bytes.x), high = halves_of<kInt8>(bytes.y);
  return {low.x, low.y, high.x, high.y};
}

/// Four e4m3 numbers, 0 in place of NaN.
CUTLASS_DEVICE uint32_t without_nan(uint32_t bytes) {
  return bytes & ~(nan_of_e4m3(bytes) * 0xffu);
}

}  // namespace cute_kernels::attention
