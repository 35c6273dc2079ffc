#pragma once

#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::fp8 {

inline constexpr int kSampleThreads = 256;
inline constexpr int kSampleChannels = 64;
inline constexpr int kSamples = 256;

enum class Statistic { kMean, kMaximum };

/// One CTA for kSampleChannels channels of a head. Sums are in a fixed order: the same bits every
/// time. NaN and what is beyond kSaturation count as 0, so that one of them does not cost all rows
/// their precision.
template <class In, Statistic kStatistic>
__global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(CUTE_GRID_CONSTANT SampleProblem const p) {
  __shared__ float totals[kSampleThreads][8 + 1];
  cudaTriggerProgrammaticLaunchCompletion();
  constexpr int kChunks = kSampleChannels / 8;
  constexpr int kLanes = kSampleThreads / kChunks;  // threads that share 8 channels
  auto const add = [](float total, float x) {
    return kStatistic == Statistic::kMean ? total + x : fmaxf(total, fabsf(x));
  };
  int const chunk = threadIdx.x % kChunks;
  int const lane = threadIdx.x / kChunks;
  int const first_channel = blockIdx.z * kSampleChannels;
  int const channels = min(kSampleChannels, p.head_dim - first_channel);
  int const step = max(1, p.seqlen / kSamples);
  int const samples = (p.seqlen + step - 1) / step;
  In const* const in = static_cast<In const*>(p.in.data) + blockIdx.y * p.in.batch_stride +
                       blockIdx.x * p.in.head_stride + first_channel + chunk * 8;
  float total[8] = {};
  if (chunk * 8 < channels) {
#pragma unroll 8
    for (int sample = lane; sample < samples; sample += kLanes) {
      uint4 const raw = *reinterpret_cast<uint4 const*>(in + static_cast<int64_t>(sample) * step *
                                                                 p.in.seqlen_stride);
      uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float2 const x = unpack<In>(words[i]);
        total[2 * i] = add(total[2 * i], fabsf(x.x) < kSaturation ? x.x : 0.f);
        total[2 * i + 1] = add(total[2 * i + 1], fabsf(x.y) < kSaturation ? x.y : 0.f);
      }
    }
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) totals[threadIdx.x][i] = total[i];
  __syncthreads();
  int64_t const pair = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  if (threadIdx.x < channels) {
    float of_all = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int other = 0; other < kLanes; ++other) {
      of_all = add(of_all, totals[other * kChunks + threadIdx.x / 8][threadIdx.x % 8]);
    }
    if (kStatistic == Statistic::kMean) of_all /= max(1, samples);
    p.result[pair * p.head_dim + first_channel + threadIdx.x] = of_all;
  }
  if (kStatistic == Statistic::kMaximum && threadIdx.x == 0) p.overflowed[pair] = 0;
  end_after_previous();
}

}  // namespace cute_kernels::fp8
