#pragma once

#include <cutlass/cutlass.h>

namespace cute_kernels::sm90 {

/// A value that the compiler knows nothing of: what follows from it is not kept from step to step
/// of a loop.
CUTLASS_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace cute_kernels::sm90
