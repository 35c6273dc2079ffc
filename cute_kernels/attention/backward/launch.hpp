#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "cute_kernels/attention/backward/kernel.hpp"
#include "cute_kernels/attention/backward/postprocess.hpp"
#include "cute_kernels/attention/backward/preprocess.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

template <class Tile>
int64_t backward_workspace_bytes(BackwardProblem const& problem) {
  return backward_workspace<BackwardTraits<Tile>>(problem).bytes;
}

/// Starts a kernel. With `early` it may start before the one before it in the stream has ended, and
/// waits itself (sm90::wait_for_previous_kernel).
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                          bool early, cudaStream_t stream, Params const& params) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = early;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

/// How many pairs of batch entry and KV head are worked on together. The more, the better a causal
/// mask's long CTAs mix with short ones, and the less a CTA waits in deterministic mode, where it
/// follows a step behind the one with the key block before. But what they touch should stay in L2:
/// between the first and the last CTA of a head, or where that is too much, altogether.
template <class Traits>
int heads_at_a_time(BackwardProblem const& problem, BackwardWorkspace const& workspace) {
  constexpr int kMost = 16;
  constexpr int64_t kL2Bytes = 50 << 20;
  // Q, dO, and dQ read and written.
  constexpr int64_t kStepBytes =
      2 * Traits::kBytesQ + 2 * Traits::kTileM * Traits::kHeadDim * sizeof(float);
  if (problem.device.multiprocessors * kStepBytes < kL2Bytes / 3) return kMost;
  if (workspace.turns == nullptr) return 1;
  int64_t const heads_in_l2 =
      kL2Bytes * (problem.causal ? 2 : 1) / (workspace.m_blocks * kStepBytes);
  return std::clamp<int>(heads_in_l2, 1, kMost);
}

/// The main kernel: dK and dV, and dQ added up in the workspace.
template <class Traits>
cudaError_t launch_backward_main(BackwardProblem const& problem, BackwardWorkspace const& workspace,
                                 cudaStream_t stream) {
  using namespace cute;
  using Element = typename Traits::Element;

  auto tensor = [&](TensorView const& view, int seqlen, int heads) {
    return global_tensor<Element>(view, seqlen, problem.head_dim, heads, problem.batch);
  };
  auto queries = [&](TensorView const& view) {
    return make_tma_copy(SM90_TMA_LOAD{}, tensor(view, problem.seqlen_q, problem.heads_q),
                         take<0, 2>(typename Traits::LayoutQ{}));
  };
  auto keys = [&](auto operation, TensorView const& view) {
    return make_tma_copy(operation, tensor(view, problem.seqlen_k, problem.heads_kv),
                         typename Traits::LayoutK{});
  };
  int const n_blocks = (problem.seqlen_k + Traits::kTileN - 1) / Traits::kTileN;
  int const pairs = problem.heads_kv * problem.batch;
  using Params =
      BackwardParams<decltype(queries(problem.q)), decltype(keys(SM90_TMA_LOAD{}, problem.k)),
                     decltype(keys(SM90_TMA_STORE{}, problem.grad_k))>;
  Params const params{
      queries(problem.q),
      queries(problem.grad_out),
      keys(SM90_TMA_LOAD{}, problem.k),
      keys(SM90_TMA_LOAD{}, problem.v),
      keys(SM90_TMA_STORE{}, problem.grad_k),
      keys(SM90_TMA_STORE{}, problem.grad_v),
      make_shape(problem.seqlen_q, problem.head_dim, problem.heads_q, problem.batch),
      make_shape(problem.seqlen_k, problem.head_dim, problem.heads_kv, problem.batch),
      workspace,
      problem.softmax_scale * sm90::kLog2e,
      problem.softmax_scale,
      problem.heads_q,
      problem.heads_q / problem.heads_kv,
      workspace.turns != nullptr,
      Mask{problem.seqlen_q, problem.seqlen_k, problem.causal},
      n_blocks,
      pairs,
      std::min(pairs, heads_at_a_time<Traits>(problem, workspace)),
      cutlass::FastDivmod(problem.heads_kv)};

  auto kernel = backward_kernel<Traits, Params>;
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory");
  cudaError_t const status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  int const grid = n_blocks * pairs;
  return launch_kernel<Params>(kernel, grid, Traits::kThreads, kSharedBytes, true, stream, params);
}

/// Starts the backward kernels of a tile on `stream`: rows' statistics, gradients, dQ's rounding.
/// Asynchronous.
template <class Tile>
cudaError_t launch_backward(BackwardProblem const& problem, cudaStream_t stream) {
  using Traits = BackwardTraits<Tile>;
  BackwardWorkspace const workspace = backward_workspace<Traits>(problem);
  dim3 const query_grid(workspace.m_blocks, problem.heads_q, problem.batch);

  cudaError_t status = launch_kernel<PreprocessParams>(
      preprocess_kernel<Traits>, query_grid, kPreprocessThreads, 0, false, stream,
      PreprocessParams{problem.out, problem.grad_out, problem.lse, problem.grad_lse,
                       problem.seqlen_q, problem.heads_q, problem.head_dim, workspace});
  if (status != cudaSuccess) return status;

  if (problem.seqlen_k > 0) {  // otherwise dQ = 0
    status = launch_backward_main<Traits>(problem, workspace, stream);
    if (status != cudaSuccess) return status;
  }

  constexpr int kSharedBytes = postprocess_shared_bytes<Traits>();
  static_assert(kSharedBytes <= 48 * 1024, "more must be asked for");
  return launch_kernel<PostprocessParams>(
      postprocess_kernel<Traits>, query_grid, 128 * Traits::kConsumers, kSharedBytes, true, stream,
      PostprocessParams{problem.grad_q, problem.softmax_scale, problem.seqlen_q, problem.head_dim,
                        problem.heads_q, workspace});
}

}  // namespace cute_kernels::attention
