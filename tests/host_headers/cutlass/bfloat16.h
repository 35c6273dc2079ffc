#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cutlass {

struct bfloat16_t {
  uint16_t bits = 0;

  bfloat16_t() = default;
  /// Rounded to the nearest, of two to the even one.
  explicit bfloat16_t(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof(x));
    if (!std::isnan(x)) word += 0x7fff + (word >> 16 & 1);
    bits = static_cast<uint16_t>(word >> 16);
  }
  static bfloat16_t bitcast(uint16_t bits) {
    bfloat16_t x;
    x.bits = bits;
    return x;
  }
  explicit operator float() const {
    uint32_t const word = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &word, sizeof(x));
    return x;
  }
};

}  // namespace cutlass
