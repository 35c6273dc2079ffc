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

/// Four int8 numbers: x + 128 in the last bits of 1024, whose next numbers are 1 apart.
CUTLASS_DEVICE uint2 halves_of_int8(uint32_t bytes) {
  uint32_t const shifted = bytes ^ 0x80808080u;
  __half2 const origin = __float2half2_rn(1024.f + 128.f);
  auto pair = [&](uint32_t selector) {
    uint32_t const raised = __byte_perm(shifted, 0x64646464u, selector);
    __half2 const x = __hsub2(reinterpret_cast<__half2 const&>(raised), origin);
    return reinterpret_cast<uint32_t const&>(x);
  };
  return {pair(0x4140), pair(0x4342)};
}

/// Eight of either.
template <bool kInt8>
CUTLASS_DEVICE uint4 halves_of(uint2 bytes) {
  uint2 const a = kInt8 ? halves_of_int8(bytes.x) : halves_of_e4m3(bytes.x);
  uint2 const b = kInt8 ? halves_of_int8(bytes.y) : halves_of_e4m3(bytes.y);
  return {a.x, a.y, b.x, b.y};
}

}  // namespace cute_kernels::attention
