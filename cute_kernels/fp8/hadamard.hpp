#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

#include "cute_kernels/fp8/problem.hpp"

// Incoherent processing (FlashAttention-3, arXiv 2407.08608, section 3.3): x M, M = H diag(signs) /
// sqrt(d). The same signs for a seed, and the same order of additions, as
// python/cute_kernels/fp8.py.
namespace cute_kernels::fp8 {

/// x H for a row of kHeadDim elements that stands in the registers of kHeadDim / kPerThread
/// neighbouring lanes, kPerThread consecutive ones in each: butterflies of stride 1, 2, 4, ...,
/// first in registers, then between lanes.
template <int kHeadDim, int kPerThread>
CUTLASS_DEVICE void hadamard_transform(float (&x)[kPerThread]) {
  CUTLASS_PRAGMA_UNROLL
  for (int stride = 1; stride < kPerThread; stride *= 2) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      if ((i & stride) == 0) {
        float const a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
  }
  CUTLASS_PRAGMA_UNROLL
  for (int lanes = 1; lanes < kHeadDim / kPerThread; lanes *= 2) {
    // The upper lane holds b and wants a - b, the lower one holds a and wants a + b.
    float const own_sign = (threadIdx.x & lanes) != 0 ? -1.f : 1.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      x[i] = fmaf(own_sign, x[i], __shfl_xor_sync(0xffffffff, x[i], lanes));
    }
  }
}

}  // namespace cute_kernels::fp8
