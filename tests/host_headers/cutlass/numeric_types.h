#pragma once

#include <cmath>
#include <cstdint>

#include <cutlass/bfloat16.h>

namespace cutlass {

struct half_t {
  uint16_t bits;
  static half_t bitcast(uint16_t bits) { return {bits}; }
  explicit operator float() const {
    int const exponent = bits >> 10 & 31, digits = bits & 1023;
    float const size = exponent == 31 ? (digits == 0 ? INFINITY : NAN)
                       : exponent == 0
                           ? std::ldexp(static_cast<float>(digits), -24)
                           : std::ldexp(static_cast<float>(1024 + digits), exponent - 25);
    return bits >> 15 != 0 ? -size : size;
  }
};

}  // namespace cutlass
