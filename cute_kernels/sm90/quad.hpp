#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

// What the four threads that share the rows of an accumulator do together.
namespace cute_kernels::sm90 {

/// x[j] of thread i of the quad becomes x[i] of thread j. By whole warps.
CUTLASS_DEVICE void transpose_among_quad(uint32_t (&x)[4]) {
  CUTLASS_PRAGMA_UNROLL
  for (int step = 1; step < 4; step *= 2) {
    bool const is_upper = (threadIdx.x & step) != 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      uint32_t& lower = x[i];
      uint32_t& upper = x[i + step];
      uint32_t const got = __shfl_xor_sync(0xffffffff, is_upper ? lower : upper, step);
      (is_upper ? lower : upper) = got;
    }
  }
}

}  // namespace cute_kernels::sm90
