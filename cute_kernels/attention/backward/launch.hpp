#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "cute_kernels/attention/backward/kernel.hpp"
#include "cute_kernels/attention/backward/postprocess.hpp"
#include "cute_kernels/attention/backward/preprocess.hpp"
#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

template <class Tile>
int64_t backward_workspace_bytes(BackwardProblem const& problem) {
  return backward_workspace<BackwardTraits<Tile>>(problem).bytes;
}

/// The main kernel: dK and dV, and dQ added up in the workspace.
template <class Traits>
cudaError_t launch_backward_main(BackwardProblem const& problem, BackwardWorkspace const& workspace,
                                 cudaStream_t stream) {
  using namespace cute;
  using Element = typename Traits::Element;

  auto tensor = [&](TensorView const& view, int seqlen, int heads) {
    return make_tensor(make_gmem_ptr(static_cast<Element*>(view.data)),
                       make_shape(seqlen, problem.head_dim, heads, problem.batch),
                       make_stride(view.seqlen_stride, _1{}, view.head_stride, view.batch_stride));
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
      problem.deterministic,
      Mask{problem.seqlen_q, problem.seqlen_k, problem.causal},
      std::min(n_blocks, problem.device.multiprocessors),
      cutlass::FastDivmod(n_blocks),
      cutlass::FastDivmod(problem.heads_kv)};

  auto kernel = backward_kernel<Traits, Params>;
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory");
  cudaError_t const status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  int const grid = n_blocks * problem.heads_kv * problem.batch;
  kernel<<<grid, Traits::kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

/// Starts the backward kernels of a tile on `stream`: rows' statistics, gradients, dQ's rounding.
/// Asynchronous.
template <class Tile>
cudaError_t launch_backward(BackwardProblem const& problem, cudaStream_t stream) {
  using Traits = BackwardTraits<Tile>;
  BackwardWorkspace const workspace = backward_workspace<Traits>(problem);
  dim3 const query_grid(workspace.m_blocks, problem.heads_q, problem.batch);

  preprocess_kernel<Traits><<<query_grid, kPreprocessThreads, 0, stream>>>(
      PreprocessParams{problem.out, problem.grad_out, problem.lse, problem.grad_lse,
                       problem.seqlen_q, problem.heads_q, problem.head_dim, workspace});
  cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;

  if (problem.seqlen_k > 0) {  // otherwise dQ = 0
    status = launch_backward_main<Traits>(problem, workspace, stream);
    if (status != cudaSuccess) return status;
  }

  auto postprocess = postprocess_kernel<Traits>;
  constexpr int kSharedBytes = postprocess_shared_bytes<Traits>();
  status =
      cudaFuncSetAttribute(postprocess, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  postprocess<<<query_grid, 128 * Traits::kConsumers, kSharedBytes, stream>>>(
      PostprocessParams{problem.grad_q, problem.softmax_scale, problem.seqlen_q, problem.head_dim,
                        problem.heads_q, workspace});
  return cudaGetLastError();
}

}  // namespace cute_kernels::attention
