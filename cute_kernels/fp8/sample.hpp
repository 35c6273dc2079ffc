#pragma once

#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

// What some rows of a head tell of all, in the bits of python/cute_kernels/fp8. Outliers among them
// do not move it, which would cost all other rows their precision.
namespace cute_kernels::fp8 {

inline constexpr int kSampleThreads = 256;
inline constexpr int kSampleChannels = 64;
inline constexpr int kSamples = 256;
// Of e4m3's range over the size of usual elements: a float is only coarser below 1/56 of that.
inline constexpr float kHeadroom = 512.f;

/// The samples of kSampleChannels channels of a head, a CTA's, dealt to the 32 groups in turn. A
/// thread reads 8 channels of a group.
template <class In, bool kPacked>
struct Samples {
  static constexpr int kGroups = 32;
  static constexpr int kChunks = kSampleChannels / 8;
  static_assert(kGroups * kChunks == kSampleThreads);

  SourceEntry<kPacked> const entry;
  int const first_channel;
  int const channels;
  int const step;
  int const samples;
  int64_t const pair;
  int const chunk = threadIdx.x % kChunks;
  int const group = threadIdx.x / kChunks;
  int const count;  // of the group
  In const* const in;

  CUTLASS_DEVICE explicit Samples(SampleProblem const& p)
      : entry(p, p.first_batch + blockIdx.z),
        first_channel(blockIdx.y * kSampleChannels),
        channels(min(kSampleChannels, p.head_dim - first_channel)),
        step(max(1, entry.seqlen(p) / kSamples)),
        samples((entry.seqlen(p) + step - 1) / step),
        pair(entry.pair(p, blockIdx.x)),
        count(chunk * 8 < channels ? (samples - group + kGroups - 1) / kGroups : 0),
        in(entry.template rows<In>(p, blockIdx.x) + first_channel + chunk * 8) {}

  /// NaN and what is beyond kSaturation count as 0, so that one of them does not cost all rows
  /// their precision.
  CUTLASS_DEVICE void load(SampleProblem const& p, int turn, float (&x)[8]) const {
    uint4 const raw = *reinterpret_cast<uint4 const*>(
        in + static_cast<int64_t>(turn * kGroups + group) * step * p.in.seqlen_stride);
    uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      float2 const pair_of_x = unpack<In>(words[i]);
      x[2 * i] = fabsf(pair_of_x.x) < kSaturation ? pair_of_x.x : 0.f;
      x[2 * i + 1] = fabsf(pair_of_x.y) < kSaturation ? pair_of_x.y : 0.f;
    }
  }
};

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

/// What most of a head's rows have in common: the median of the groups, each with the mean of the
/// medians of its samples taken three at a time, the last one again where some lack. As near to all
/// rows as their mean where they are alike.
template <class In, bool kPacked>
__global__ void __launch_bounds__(kSampleThreads)
    center_kernel(CUTE_GRID_CONSTANT SampleProblem const p) {
  using Rows = Samples<In, kPacked>;
  __shared__ float means[Rows::kGroups][kSampleChannels + 1];
  cudaTriggerProgrammaticLaunchCompletion();
  Rows const s(p);
  float total[8] = {};
#pragma unroll 3
  for (int first = 0; first < s.count; first += 3) {
    float a[8], b[8], c[8];
    s.load(p, first, a);
    s.load(p, min(first + 1, s.count - 1), b);
    s.load(p, min(first + 2, s.count - 1), c);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      total[i] += fmaxf(fminf(a[i], b[i]), fminf(fmaxf(a[i], b[i]), c[i]));
    }
  }
  float const triples = static_cast<float>((s.count + 2) / 3);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    means[s.group][s.chunk * 8 + i] = s.count > 0 ? __fdiv_rn(total[i], triples) : INFINITY;
  }
  __syncthreads();
  int const lane = threadIdx.x % 32;
  int const chunk = threadIdx.x / 32;  // a warp has 8 channels, a lane a group
  float sorted[8];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) sorted[i] = means[lane][chunk * 8 + i];
  sort_over_lanes(sorted);
  int const groups = min(s.samples, Rows::kGroups);
  float median = 0.f;  // of channel `lane`
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    float const low = __shfl_sync(0xffffffff, sorted[i], (groups - 1) / 2);
    float const high = __shfl_sync(0xffffffff, sorted[i], groups / 2);
    if (lane == i) median = (low + high) * 0.5f;
  }
  if (lane < 8 && chunk * 8 < s.channels) {
    p.result[s.pair * p.head_dim + s.first_channel + chunk * 8 + lane] = median;
  }
  end_after_previous();
}

/// What elements are to be scaled for: kHeadroom times the usual size, or the largest sample. The
/// usual size is a geometric mean, of numbers that are not 0: of floats' bits, whose mean is nearly
/// one of logarithms, and exact in any order.
template <class In, bool kPacked>
__global__ void __launch_bounds__(kSampleThreads)
    range_kernel(CUTE_GRID_CONSTANT SampleProblem const p) {
  using Rows = Samples<In, kPacked>;
  __shared__ uint32_t logarithms[Rows::kGroups][kSampleChannels + 1];
  __shared__ uint32_t counts[Rows::kGroups][kSampleChannels + 1];
  __shared__ uint32_t largest[Rows::kGroups][kSampleChannels + 1];
  cudaTriggerProgrammaticLaunchCompletion();
  Rows const s(p);
  uint32_t logarithm[8] = {}, count[8] = {}, most[8] = {};
#pragma unroll 8
  for (int turn = 0; turn < s.count; ++turn) {
    float x[8];
    s.load(p, turn, x);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      float const size = fabsf(x[i]);
      bool const counts_too = size >= kSmallestMaximum;
      uint32_t const bits = counts_too ? __float_as_uint(size) : 0;
      logarithm[i] += bits >> 16;
      count[i] += counts_too;
      most[i] = max(most[i], bits);
    }
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    logarithms[s.group][s.chunk * 8 + i] = logarithm[i];
    counts[s.group][s.chunk * 8 + i] = count[i];
    largest[s.group][s.chunk * 8 + i] = most[i];
  }
  __syncthreads();
  int const lane = threadIdx.x % 32;
  int const chunk = threadIdx.x / 32;  // a warp has 8 channels, a lane a group
  float range = 0.f;                   // of channel `lane`
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    uint32_t const sum = __reduce_add_sync(0xffffffff, logarithms[lane][chunk * 8 + i]);
    uint32_t const of_all = __reduce_add_sync(0xffffffff, counts[lane][chunk * 8 + i]);
    uint32_t const highest = __reduce_max_sync(0xffffffff, largest[lane][chunk * 8 + i]);
    float const usual = __uint_as_float(sum / max(of_all, 1u) << 16);
    if (lane == i) range = fmaxf(usual * kHeadroom, __uint_as_float(highest));
  }
  if (lane < 8 && chunk * 8 < s.channels) {
    p.result[s.pair * p.head_dim + s.first_channel + chunk * 8 + lane] = range;
  }
  if (threadIdx.x == 0) p.overflowed[s.pair] = 0;
  end_after_previous();
}

}  // namespace cute_kernels::fp8
