#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/sm90/math.hpp"

// Incoherent processing (FlashAttention-3, arXiv 2407.08608, section 3.3): x M, M = H diag(signs) /
// sqrt(d). The same signs for a seed, and the same order of additions, as
// python/cute_kernels/fp8.
namespace cute_kernels::fp8 {

template <int kNumbers>
CUTLASS_DEVICE void butterflies(float (&x)[kNumbers], int stride) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kNumbers; ++i) {
    if ((i & stride) == 0) {
      float const a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
}

/// Those between kLanes neighbouring lanes.
template <int kLanes, int kNumbers>
CUTLASS_DEVICE void butterflies_of_lanes(float (&x)[kNumbers]) {
  CUTLASS_PRAGMA_UNROLL
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    // The upper lane holds b and wants a - b, the lower one holds a and wants a + b.
    float const own_sign = (threadIdx.x & lanes) != 0 ? -1.f : 1.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kNumbers; ++i) {
      x[i] = fmaf(own_sign, x[i], __shfl_xor_sync(0xffffffff, x[i], lanes));
    }
  }
}

/// x H for a row of 8 kLanes kChunks elements in the registers of kLanes neighbouring lanes:
/// register 8 c + i of lane l holds channel 8 (kLanes c + l) + i, so that lanes read and write what
/// lies together. Butterflies of stride 1, 2, 4, ...: inside runs of 8, between lanes, between
/// runs. Returns the largest magnitude of the thread's results; NaN if there is one.
template <int kLanes, int kChunks>
CUTLASS_DEVICE float hadamard_transform(float (&x)[8 * kChunks]) {
  butterflies(x, 1);
  butterflies(x, 2);
  butterflies(x, 4);
  butterflies_of_lanes<kLanes>(x);
  CUTLASS_PRAGMA_UNROLL
  for (int chunks = 1; chunks < kChunks / 2; chunks *= 2) butterflies(x, 8 * chunks);
  // The larger one of |a + b| and |a - b| is |a| + |b|, to the bit.
  static_assert(kChunks > 1);
  float maximum = 0.f;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 4 * kChunks; ++i) {
    maximum = sm90::max_nan(maximum, fabsf(x[i]) + fabsf(x[i + 4 * kChunks]));
  }
  butterflies(x, 4 * kChunks);
  return maximum;
}

/// The same of the Kronecker product of the reflection I - (2 / runs) J and a Hadamard matrix of
/// order 8 kLanes: of a row whose first `runs` chunks, an odd number, are there, and the others 0.
template <int kLanes, int kChunks>
CUTLASS_DEVICE float reflected_transform(float (&x)[8 * kChunks], int runs) {
  butterflies(x, 1);
  butterflies(x, 2);
  butterflies(x, 4);
  butterflies_of_lanes<kLanes>(x);
  float const factor = __fdiv_rn(2.f, static_cast<float>(runs));
  float maximum = 0.f;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    float sum = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < kChunks; ++c) sum += x[8 * c + i];
    float const twice_mean = runs == 1 ? 0.f : __fmul_rn(sum, factor);
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if (c < runs) x[8 * c + i] = __fsub_rn(x[8 * c + i], twice_mean);
      maximum = sm90::max_nan(maximum, fabsf(x[8 * c + i]));
    }
  }
  return maximum;
}

/// x H for a row of 8 `lanes` elements, a power of two, 8 in the registers of each lane in order.
/// Whole warps come here.
CUTLASS_DEVICE void hadamard_transform(float (&x)[8], int lanes) {
  CUTLASS_PRAGMA_UNROLL
  for (int stride = 1; stride < 8; stride *= 2) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      if ((i & stride) != 0) continue;
      float const a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
  CUTLASS_PRAGMA_NO_UNROLL
  for (int distance = 1; distance < lanes; distance *= 2) {
    float const own_sign = (threadIdx.x & distance) != 0 ? -1.f : 1.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      x[i] = fmaf(own_sign, x[i], __shfl_xor_sync(0xffffffff, x[i], distance));
    }
  }
}

/// Flips the signs of 8 channels from a multiple of 8 on.
CUTLASS_DEVICE void flip_signs(float (&x)[8], Signs const& signs, int channel) {
  uint32_t const own = signs.words[channel / 32] >> channel % 32;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = __uint_as_float(__float_as_uint(x[i]) ^ (own >> i & 1) << 31);
  }
}

}  // namespace cute_kernels::fp8
