#pragma once

#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::fp8 {

inline constexpr int kMeanThreads = 256;
inline constexpr int kMeanChannels = 64;
inline constexpr int kKeySamples = 256;

/// One CTA for kMeanChannels channels of a head. Sums are in a fixed order: the same bits every
/// time.
template <class In>
__global__ void __launch_bounds__(kMeanThreads)
    key_mean_kernel(CUTE_GRID_CONSTANT KeyMeanProblem const p) {
  __shared__ float sums[kMeanThreads][8 + 1];
  cudaTriggerProgrammaticLaunchCompletion();
  constexpr int kChunks = kMeanChannels / 8;
  constexpr int kLanes = kMeanThreads / kChunks;  // threads that share 8 channels
  int const chunk = threadIdx.x % kChunks;
  int const lane = threadIdx.x / kChunks;
  int const first_channel = blockIdx.z * kMeanChannels;
  int const channels = min(kMeanChannels, p.head_dim - first_channel);
  int const step = max(1, p.seqlen / kKeySamples);
  int const samples = (p.seqlen + step - 1) / step;
  In const* const in = static_cast<In const*>(p.in.data) + blockIdx.y * p.in.batch_stride +
                       blockIdx.x * p.in.head_stride + first_channel + chunk * 8;
  float sum[8] = {};
  if (chunk * 8 < channels) {
#pragma unroll 8
    for (int sample = lane; sample < samples; sample += kLanes) {
      uint4 const raw = *reinterpret_cast<uint4 const*>(in + static_cast<int64_t>(sample) * step *
                                                                 p.in.seqlen_stride);
      uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {  // one that is too large must not cost all rows
        float2 const x = unpack<In>(words[i]);
        sum[2 * i] += fabsf(x.x) < kSaturation ? x.x : 0.f;
        sum[2 * i + 1] += fabsf(x.y) < kSaturation ? x.y : 0.f;
      }
    }
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) sums[threadIdx.x][i] = sum[i];
  __syncthreads();
  if (threadIdx.x < channels) {
    float total = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int other = 0; other < kLanes; ++other) {
      total += sums[other * kChunks + threadIdx.x / 8][threadIdx.x % 8];
    }
    int64_t const pair = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
    p.mean[pair * p.head_dim + first_channel + threadIdx.x] = total / max(1, samples);
  }
  end_after_previous();
}

}  // namespace cute_kernels::fp8
