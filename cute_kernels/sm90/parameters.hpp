#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

namespace cute_kernels::sm90 {

/// Reads something of each line of a kernel's parameters. They are new in every launch, and a line
/// that is not in the constant cache yet is waited for wherever it is read first.
template <class Parameters>
CUTLASS_DEVICE void touch_parameters(Parameters const& parameters) {
  constexpr int kLineWords = 16;
  constexpr int kWords = sizeof(Parameters) / sizeof(uint32_t);
  auto const* const words = reinterpret_cast<uint32_t const*>(&parameters);
  uint32_t sum = words[kWords - 1];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kWords; i += kLineWords) sum += words[i];
  // A use of them that costs nothing.
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.eq.u32 p, %0, 0x9e3779b9;\n"
      "@p nanosleep.u32 0;\n"
      "}" ::"r"(sum));
}

}  // namespace cute_kernels::sm90
