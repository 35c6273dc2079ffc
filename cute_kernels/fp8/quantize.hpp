#pragma once

#include <cuda_runtime.h>

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/fp8/hadamard.hpp"
#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize_launch.hpp"

// Quantisation to 8 bits. The arithmetic is that of python/cute_kernels/fp8.py, to the bit.
namespace cute_kernels::fp8 {

static_assert(kBlockRows == attention::kScaleRows);

inline constexpr float kSaturation = 0x1p48f;        // scores of saturated inputs are still finite
inline constexpr float kSmallestMaximum = 0x1p-60f;  // scales and their inverses are finite

template <class Element>
inline constexpr float kLargest = 448.f;
template <>
inline constexpr float kLargest<int8_t> = 127.f;

/// Clamps to +-kSaturation; NaN stays NaN.
CUTLASS_DEVICE float saturate(float x) {
  return x > kSaturation ? kSaturation : x < -kSaturation ? -kSaturation : x;
}

template <class Out>
CUTLASS_DEVICE void round_to(float const (&x)[16], float factor, Out (&out)[16]) {
  if constexpr (std::is_same_v<Out, int8_t>) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<int8_t>(min(max(__float2int_rn(x[i] * factor), -127), 127));
    }
  } else {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 16; i += 4) {
      cutlass::NumericArrayConverter<Out, float, 4> convert;
      *reinterpret_cast<cutlass::Array<Out, 4>*>(&out[i]) = convert(cutlass::Array<float, 4>{
          x[i] * factor, x[i + 1] * factor, x[i + 2] * factor, x[i + 3] * factor});
    }
  }
}

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kKeySamples = 256;
inline constexpr int kTransposeKeys = 64;

/// One CTA a head. Sums are in a fixed order: the same bits every time.
template <class In>
__global__ void __launch_bounds__(kQuantizeThreads)
    key_mean_kernel(CUTE_GRID_CONSTANT KeyMeanProblem const p) {
  __shared__ float sums[kQuantizeThreads][8 + 1];
  int const chunks = p.head_dim / 8;
  int const lanes = kQuantizeThreads / chunks;  // threads that share 8 channels
  int const chunk = threadIdx.x % chunks;
  int const lane = threadIdx.x / chunks;
  int const step = max(1, p.seqlen / kKeySamples);
  int const samples = (p.seqlen + step - 1) / step;
  In const* const in = static_cast<In const*>(p.in.data) + blockIdx.y * p.in.batch_stride +
                       blockIdx.x * p.in.head_stride + chunk * 8;
  float sum[8] = {};
  if (lane < lanes) {
#pragma unroll 4
    for (int sample = lane; sample < samples; sample += lanes) {
      uint4 const raw = *reinterpret_cast<uint4 const*>(in + static_cast<int64_t>(sample) * step *
                                                                 p.in.seqlen_stride);
      In const* const elements = reinterpret_cast<In const*>(&raw);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 8; ++i) {
        float const x = static_cast<float>(elements[i]);
        sum[i] += fabsf(x) < kSaturation ? x : 0.f;  // one of them must not cost all rows
      }
    }
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) sums[threadIdx.x][i] = sum[i];
  __syncthreads();
  if (threadIdx.x < p.head_dim) {
    float total = 0.f;
    for (int other = 0; other < lanes; ++other) {
      total += sums[other * chunks + threadIdx.x / 8][threadIdx.x % 8];
    }
    int64_t const pair = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
    p.mean[pair * p.head_dim + threadIdx.x] = total / max(1, samples);
  }
}

/// One CTA quantises the kBlockRows rows of a head that share a scale: everything is read once,
/// stays in registers, and is written once.
template <class In, class Out, int kHeadDim>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(CUTE_GRID_CONSTANT QuantizeRowsProblem const p) {
  constexpr int kPerThread = 16;
  constexpr int kThreadsPerRow = kHeadDim / kPerThread;
  constexpr int kRowsAtOnce = kQuantizeThreads / kThreadsPerRow;
  constexpr int kSteps = kBlockRows / kRowsAtOnce;
  static_assert(kBlockRows % kRowsAtOnce == 0);

  int const head = blockIdx.x;
  int const block = blockIdx.y;
  int const batch = blockIdx.z;
  int const channel = threadIdx.x % kThreadsPerRow * kPerThread;
  int const first_row = block * kBlockRows + threadIdx.x / kThreadsPerRow;
  In const* const in = static_cast<In const*>(p.in.data) + batch * p.in.batch_stride +
                       head * p.in.head_stride + channel;

  // All loads first: they are what the kernel's time is made of.
  uint4 raw[kSteps][2];
  CUTLASS_PRAGMA_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    int const row = first_row + step * kRowsAtOnce;
    raw[step][0] = raw[step][1] = make_uint4(0, 0, 0, 0);
    if (row < p.seqlen) {
      auto const* from = reinterpret_cast<uint4 const*>(in + row * p.in.seqlen_stride);
      raw[step][0] = __ldcs(from);
      raw[step][1] = __ldcs(from + 1);
    }
  }

  int64_t const pair = static_cast<int64_t>(batch) * p.heads + head;
  float shift[kPerThread] = {};
  if (p.shift != nullptr) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPerThread; i += 4) {
      *reinterpret_cast<float4*>(&shift[i]) =
          *reinterpret_cast<float4 const*>(p.shift + pair * kHeadDim + channel + i);
    }
  }

  float x[kSteps][kPerThread];
  float maximum = 0.f;
  bool has_nan = false;
  uint32_t const signs = p.incoherent ? p.signs.words[channel / 32] >> (channel % 32) : 0;
  CUTLASS_PRAGMA_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    In const* const elements = reinterpret_cast<In const*>(raw[step]);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      float const value = saturate(static_cast<float>(elements[i])) - shift[i];
      x[step][i] = __int_as_float(__float_as_int(value) ^ (signs >> i << 31));
    }
    if (p.incoherent) {
      hadamard_transform<kHeadDim>(x[step]);
      constexpr float kNorm = kHeadDim == 64    ? 0.125f
                              : kHeadDim == 256 ? 0.0625f
                                                : 0.08838834764831845f;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPerThread; ++i) x[step][i] *= kNorm;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      maximum = fmaxf(maximum, fabsf(x[step][i]));  // passes over NaN
      if constexpr (std::is_same_v<Out, int8_t>) has_nan |= x[step][i] != x[step][i];
    }
  }

  CUTLASS_PRAGMA_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, lanes));
  }
  __shared__ float warp_maximum[kQuantizeThreads / 32];
  if (threadIdx.x % 32 == 0) warp_maximum[threadIdx.x / 32] = maximum;
  has_nan = __syncthreads_or(has_nan);
  maximum = kSmallestMaximum;
  CUTLASS_PRAGMA_UNROLL
  for (int warp = 0; warp < kQuantizeThreads / 32; ++warp) {
    maximum = fmaxf(maximum, warp_maximum[warp]);
  }
  // int8 has no NaN: there the scale tells of one, and the elements are 0.
  float const factor = has_nan ? NAN : __fdiv_rn(kLargest<Out>, maximum);
  float const scale = has_nan ? NAN : __fdiv_rn(maximum, kLargest<Out>);
  if (threadIdx.x == 0) p.scale[pair * gridDim.y + block] = scale;

  Out* const out = static_cast<Out*>(p.out) + head * kHeadDim + channel;
  CUTLASS_PRAGMA_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    int const row = first_row + step * kRowsAtOnce;
    if (row < p.seqlen) {
      alignas(16) Out rounded[kPerThread];
      round_to(x[step], factor, rounded);
      *reinterpret_cast<uint4*>(out + (static_cast<int64_t>(batch) * p.seqlen + row) * p.heads *
                                          kHeadDim) = *reinterpret_cast<uint4 const*>(rounded);
    }
  }
}

/// The largest finite magnitude of every channel of a head over some rows, into `maximum`.
template <class In>
__global__ void __launch_bounds__(kQuantizeThreads)
    value_maximum_kernel(CUTE_GRID_CONSTANT QuantizeValuesProblem const p, int rows) {
  __shared__ int shared_maximum[kMaxHeadDim];
  int const chunks = p.head_dim / 8;
  int const rows_at_once = kQuantizeThreads / chunks;
  int const chunk = threadIdx.x % chunks;
  int const end = min(p.seqlen, static_cast<int>(blockIdx.y + 1) * rows);
  In const* const in = static_cast<In const*>(p.in.data) + blockIdx.z * p.in.batch_stride +
                       blockIdx.x * p.in.head_stride + chunk * 8;
  float maximum[8] = {};
  if (threadIdx.x < rows_at_once * chunks) {
#pragma unroll 4
    for (int row = blockIdx.y * rows + threadIdx.x / chunks; row < end; row += rows_at_once) {
      uint4 const raw = *reinterpret_cast<uint4 const*>(in + row * p.in.seqlen_stride);
      In const* const elements = reinterpret_cast<In const*>(&raw);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 8; ++i) {
        maximum[i] = fmaxf(maximum[i], fabsf(saturate(static_cast<float>(elements[i]))));
      }
    }
  }
  shared_maximum[threadIdx.x] = 0;
  __syncthreads();
  // Magnitudes are ordered as their bits are.
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    atomicMax(&shared_maximum[chunk * 8 + i], __float_as_int(maximum[i]));
  }
  __syncthreads();
  if (threadIdx.x < p.head_dim) {
    int64_t const pair = static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.x;
    atomicMax(reinterpret_cast<int*>(p.maximum) + pair * p.head_dim + threadIdx.x,
              shared_maximum[threadIdx.x]);
  }
}

/// Rounds 64 keys of a head to e4m3, if they are not yet, and turns them: a thread rounds 4 keys
/// that stand together in the key order, 8 channels at a time, shared memory turns the words.
template <class In>
__global__ void __launch_bounds__(kQuantizeThreads)
    transpose_values_kernel(CUTE_GRID_CONSTANT QuantizeValuesProblem const p) {
  using Out = cutlass::float_e4m3_t;
  constexpr bool kMove = std::is_same_v<In, Out>;
  constexpr int kKeys = kTransposeKeys;
  constexpr int kWords = kKeys / 4;
  constexpr int kPitch = kWords + 1;  // spreads a column of words over the banks
  __shared__ uint32_t turned[kMaxHeadDim * kPitch];
  // From the last block to the first: the last ones still stand in L2 from value_maximum_kernel.
  int const block = gridDim.x - 1 - blockIdx.x;
  int const head = gridDim.y - 1 - blockIdx.y;
  int const batch = gridDim.z - 1 - blockIdx.z;
  int const chunks = p.head_dim / 8;
  int const first_key = block * kKeys;
  int64_t const pair = static_cast<int64_t>(batch) * p.heads + head;
  for (int item = threadIdx.x; item < kWords * chunks; item += kQuantizeThreads) {
    int const chunk = item % chunks;
    int const word = item / chunks;
    float factor[8];
    if constexpr (!kMove) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 8; ++i) {
        int64_t const channel = pair * p.head_dim + chunk * 8 + i;
        float const maximum = fmaxf(p.maximum[channel], kSmallestMaximum);
        factor[i] = __fdiv_rn(kLargest<Out>, maximum);
        if (block == 0 && word == 0) p.scale[channel] = __fdiv_rn(maximum, kLargest<Out>);
      }
    }
    alignas(16) In elements[4][8];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      int const key = first_key + word / 4 * 16 + attention::value_key_order(word % 4 * 4 + i);
      using Raw = std::conditional_t<kMove, uint2, uint4>;
      Raw raw{};
      if (key < p.seqlen) {
        raw = *reinterpret_cast<Raw const*>(static_cast<In const*>(p.in.data) +
                                            batch * p.in.batch_stride + key * p.in.seqlen_stride +
                                            head * p.in.head_stride + chunk * 8);
      }
      *reinterpret_cast<Raw*>(elements[i]) = raw;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      cutlass::Array<Out, 4> keys;
      if constexpr (kMove) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) keys[j] = elements[j][i];
      } else {
        cutlass::Array<float, 4> scaled;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) {
          scaled[j] = saturate(static_cast<float>(elements[j][i])) * factor[i];
        }
        keys = cutlass::NumericArrayConverter<Out, float, 4>{}(scaled);
      }
      turned[(chunk * 8 + i) * kPitch + word] = *reinterpret_cast<uint32_t const*>(&keys);
    }
  }
  __syncthreads();
  int const padded = (p.seqlen + 15) / 16 * 16;
  Out* const out = static_cast<Out*>(p.out) + pair * p.head_dim * padded + first_key;
  for (int item = threadIdx.x; item < p.head_dim * kWords / 4; item += kQuantizeThreads) {
    int const channel = item / (kWords / 4);
    int const part = item % (kWords / 4);
    if (first_key + part * 16 >= padded) continue;
    uint32_t const* const words = &turned[channel * kPitch + part * 4];
    *reinterpret_cast<uint4*>(out + static_cast<int64_t>(channel) * padded + part * 16) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace cute_kernels::fp8
