#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/backward/workspace.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/sm90/launch.hpp"
#include "cute_kernels/sm90/math.hpp"

// The gradient of sinks: of a head's rows the sum of P_sink (grad_lse - rowsum(dO * O)), with
// P_sink = exp(sink - lse) the sink's share of a row's softmax. Preprocess, which knows both, sums
// over a query block, a kernel behind the others over the blocks: always in one order.
namespace cute_kernels::attention {

/// What a row adds. A sink is no larger than the lse that it is a part of, but for rounding of
/// large ones; where both are -inf, it is all of it.
CUTLASS_DEVICE float gradient_of_sink(float sink, float lse, float minus_delta) {
  float const share = lse == -INFINITY ? 1.f : sm90::exp2_mufu((sink - lse) * sm90::kLog2e);
  return sm90::min_nan(share, 1.f) * minus_delta;
}

/// The sum over the kThreads threads of a CTA, valid in thread 0.
template <int kThreads>
CUTLASS_DEVICE float sum_of_cta(float value) {
  constexpr int kWarps = kThreads / cutlass::NumThreadsPerWarp;
  __shared__ float of_warp[kWarps];
  CUTLASS_PRAGMA_UNROLL
  for (int step = cutlass::NumThreadsPerWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, step);
  }
  if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
    of_warp[threadIdx.x / cutlass::NumThreadsPerWarp] = value;
  }
  __syncthreads();
  float sum = 0.f;
  CUTLASS_PRAGMA_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp];
  return sum;
}

/// One CTA for each head of a batch entry.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    sinks_kernel(float const* of_blocks, int m_blocks, float* grad_sinks) {
  float sum = 0.f;
  for (int block = threadIdx.x; block < m_blocks; block += kThreads) {
    sum += of_blocks[int64_t{blockIdx.x} * m_blocks + block];
  }
  sum = sum_of_cta<kThreads>(sum);
  if (threadIdx.x == 0) grad_sinks[blockIdx.x] = sum;
}

/// Starts it, behind the kernels of the call.
inline cudaError_t launch_sinks(BackwardProblem const& problem, BackwardWorkspace const& workspace,
                                cudaStream_t stream) {
  constexpr int kThreads = 128;
  sm90::Launch how{};
  how.grid = dim3(problem.call.sizes.heads_q * tensor_batch(problem.call));
  how.threads = kThreads;
  how.stream = stream;
  how.device = problem.device.index;
  float const* const of_blocks = workspace.sinks;
  return sm90::launch_kernel<sinks_kernel<kThreads>>(how, of_blocks, workspace.m_blocks.divisor,
                                                     problem.grad_sinks);
}

}  // namespace cute_kernels::attention
