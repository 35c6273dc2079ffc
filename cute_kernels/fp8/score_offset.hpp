#pragma once

#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::fp8 {

inline constexpr int kOffsetThreads = 256;

/// What K's shift adds to the scores of each row of Q. A warp takes one row after the other of a
/// block of kBlockRows, its lanes 8 channels each.
template <class In, bool kPacked>
__global__ void __launch_bounds__(kOffsetThreads)
    score_offset_kernel(CUTE_GRID_CONSTANT ScoreOffsetProblem const p) {
  constexpr int kLanes = 32;
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  SourceBlock<kPacked, kBlockRows> const block(p);
  if (block.is_empty(p)) return;
  int const head = blockIdx.x, channel = threadIdx.x % kLanes * 8;
  bool const is_there = channel < p.head_dim;
  float shift[8] = {};
  if (is_there) {
    int64_t const pair = static_cast<int64_t>(block.entry.number()) * (p.heads / p.heads_per_kv) +
                         head / p.heads_per_kv;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 8; ++i) shift[i] = __ldcg(p.shift + pair * p.head_dim + channel + i);
  }
  int const seqlen = block.entry.seqlen(p);
  int const end = min((block.number() + 1) * kBlockRows, seqlen);
  In const* const in = block.entry.template rows<In>(p, head) + channel;
  float* const result =
      p.result + (kPacked ? static_cast<int64_t>(head) * p.seqlen + block.entry.first_row(p)
                          : block.entry.pair(p, head) * p.seqlen);
  for (int row = block.number() * kBlockRows + threadIdx.x / kLanes; row < end;
       row += kOffsetThreads / kLanes) {
    float sum = 0.f;
    if (is_there) {
      uint4 const raw = *reinterpret_cast<uint4 const*>(in + row * p.in.seqlen_stride);
      uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float2 const x = unpack<In>(words[i]);
        sum += saturate(x.x) * shift[2 * i] + saturate(x.y) * shift[2 * i + 1];
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    if (threadIdx.x % kLanes == 0) result[row] = p.scale * sum;
  }
}

__global__ void __launch_bounds__(kOffsetThreads)
    add_kernel(float* to, float const* from, int64_t count) {
  int64_t const i = int64_t{blockIdx.x} * kOffsetThreads + threadIdx.x;
  if (i < count) to[i] += from[i];
}

}  // namespace cute_kernels::fp8
