#pragma once

#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::fp8 {

inline constexpr int kSampleThreads = 256;
inline constexpr int kSampleChannels = 64;
inline constexpr int kSamples = 256;
// Of e4m3's range over the size of usual elements: a float is only coarser below 1/110 of that.
inline constexpr float kHeadroom = 256.f;

/// What samples tell: kCenter, what most rows have in common; kRange, what elements are to be
/// scaled for, kHeadroom times the size of usual ones or the largest of the samples.
enum class Statistic { kCenter, kRange };

/// Sorts each of the numbers over the lanes of a warp.
template <int kNumbers>
CUTLASS_DEVICE void sort_over_lanes(float (&x)[kNumbers]) {
  int const lane = threadIdx.x % 32;
  CUTLASS_PRAGMA_UNROLL
  for (int size = 2; size <= 32; size *= 2) {
    CUTLASS_PRAGMA_UNROLL
    for (int stride = size / 2; stride > 0; stride /= 2) {
      bool const keeps_smaller = ((lane & stride) == 0) == ((lane & size) == 0);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kNumbers; ++i) {
        float const other = __shfl_xor_sync(0xffffffff, x[i], stride);
        x[i] = keeps_smaller ? fminf(x[i], other) : fmaxf(x[i], other);
      }
    }
  }
}

/// One CTA for kSampleChannels channels of a head. Samples are dealt to kLanes groups in turn; the
/// median of the groups' means is as near to all rows as their mean where they are alike, and not
/// moved by outliers, which would cost all other rows their precision. NaN and what is beyond
/// kSaturation count as 0. The same bits as python/cute_kernels/fp8: sums are in a fixed order.
template <class In, Statistic kStatistic>
__global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(CUTE_GRID_CONSTANT SampleProblem const p) {
  constexpr bool kSizes = kStatistic == Statistic::kRange;  // magnitudes, of those that are not 0
  constexpr int kChunks = kSampleChannels / 8;
  constexpr int kLanes = kSampleThreads / kChunks;  // threads that share 8 channels
  static_assert(kLanes == 32 && kSampleThreads / 32 == kChunks);
  __shared__ float means[kLanes][kSampleChannels + 1];
  __shared__ float largest[kSizes ? kLanes : 1][kSampleChannels + 1];
  cudaTriggerProgrammaticLaunchCompletion();
  int const batch = p.first_batch + blockIdx.z;
  int const first_channel = blockIdx.y * kSampleChannels;
  int const channels = min(kSampleChannels, p.head_dim - first_channel);
  {
    int const chunk = threadIdx.x % kChunks;
    int const lane = threadIdx.x / kChunks;
    int const step = max(1, p.seqlen / kSamples);
    int const samples = (p.seqlen + step - 1) / step;
    In const* const in = static_cast<In const*>(p.in.data) + batch * p.in.batch_stride +
                         blockIdx.x * p.in.head_stride + first_channel + chunk * 8;
    float total[8] = {}, most[8] = {}, count[8] = {};
    if (chunk * 8 < channels) {
#pragma unroll 8
      for (int sample = lane; sample < samples; sample += kLanes) {
        uint4 const raw = *reinterpret_cast<uint4 const*>(in + static_cast<int64_t>(sample) * step *
                                                                   p.in.seqlen_stride);
        uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) {
          float2 const pair = unpack<In>(words[i / 2]);
          float const x = i % 2 == 0 ? pair.x : pair.y;
          float const size = fabsf(x);
          bool const counts = size < kSaturation && (!kSizes || size >= kSmallestMaximum);
          total[i] += !counts ? 0.f : kSizes ? size : x;
          if constexpr (kSizes) {
            most[i] = fmaxf(most[i], counts ? size : 0.f);
            count[i] += counts ? 1.f : 0.f;
          } else {
            count[i] += 1.f;
          }
        }
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      means[lane][chunk * 8 + i] = count[i] > 0.f ? __fdiv_rn(total[i], count[i]) : INFINITY;
      if constexpr (kSizes) largest[lane][chunk * 8 + i] = most[i];
    }
  }
  __syncthreads();
  int const lane = threadIdx.x % 32;
  int const chunk = threadIdx.x / 32;  // a warp has 8 channels, a lane one group
  float mean[8];
  int groups[8];  // that have a mean
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    mean[i] = means[lane][chunk * 8 + i];
    groups[i] = __popc(__ballot_sync(0xffffffff, mean[i] != INFINITY));
  }
  sort_over_lanes(mean);
  float result = 0.f;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    float const low = __shfl_sync(0xffffffff, mean[i], max(groups[i] - 1, 0) / 2);
    float const high = __shfl_sync(0xffffffff, mean[i], groups[i] / 2);
    float median = groups[i] > 0 ? (low + high) * 0.5f : 0.f;
    if constexpr (kSizes) {
      uint32_t const most =
          __reduce_max_sync(0xffffffff, __float_as_uint(largest[lane][chunk * 8 + i]));
      median = fmaxf(median * kHeadroom, __uint_as_float(most));
    }
    if (lane == i) result = median;
  }
  int64_t const pair = static_cast<int64_t>(batch) * p.heads + blockIdx.x;
  if (lane < 8 && chunk * 8 < channels) {
    p.result[pair * p.head_dim + first_channel + chunk * 8 + lane] = result;
  }
  if (kSizes && threadIdx.x == 0) p.overflowed[pair] = 0;
  end_after_previous();
}

}  // namespace cute_kernels::fp8
