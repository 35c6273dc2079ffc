#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/forward/fp8_kernel.hpp"

namespace cute_kernels::attention {

/// Starts the FP8 forward kernel of a tile on `stream`: TMA descriptors, grid, launch.
/// Asynchronous.
template <class Tile>
cudaError_t launch_fp8_forward(Fp8ForwardProblem const& problem, cudaStream_t stream) {
  using namespace cute;
  using Traits = Fp8ForwardTraits<Tile>;

  auto tensor = [](auto element, TensorView const& view, int seqlen, int head_dim, int heads,
                   int batch) {
    return make_tensor(make_gmem_ptr(static_cast<decltype(element)*>(view.data)),
                       make_shape(seqlen, head_dim, heads, batch),
                       make_stride(view.seqlen_stride, _1{}, view.head_stride, view.batch_stride));
  };
  using ElementQk = typename Traits::ElementQk;
  // A descriptor of no keys is not allowed; with seqlen_k = 0 nothing is loaded through it.
  int const keys = problem.seqlen_k > 0 ? problem.seqlen_k : 1;
  int const padded_keys = (keys + 15) / 16 * 16;
  auto q = tensor(ElementQk{}, problem.q, problem.seqlen_q, problem.head_dim, problem.heads_q,
                  problem.batch);
  auto k = tensor(ElementQk{}, problem.k, keys, problem.head_dim, problem.heads_kv, problem.batch);
  auto v = tensor(typename Traits::ElementPv{}, problem.v, problem.head_dim, padded_keys,
                  problem.heads_kv, problem.batch);
  auto o = tensor(typename Traits::Output{}, problem.out, problem.seqlen_q, problem.head_dim,
                  problem.heads_q, problem.batch);
  auto tma_q = make_tma_copy(SM90_TMA_LOAD{}, q, typename Traits::LayoutQ{});
  auto tma_k = make_tma_copy(SM90_TMA_LOAD{}, k, take<0, 2>(typename Traits::LayoutK{}));
  auto tma_v = make_tma_copy(SM90_TMA_LOAD{}, v, typename Traits::LayoutValueLoad{});
  auto tma_o = make_tma_copy(SM90_TMA_STORE{}, o, typename Traits::LayoutO{});

  int const heads_per_kv = problem.heads_q / problem.heads_kv;
  int const m_blocks = (problem.seqlen_q + Traits::kTileM - 1) / Traits::kTileM;
  using Params =
      Fp8ForwardParams<Traits, decltype(tma_q), decltype(tma_k), decltype(tma_v), decltype(tma_o)>;
  Params const params{
      {tma_q, tma_k, tma_v, tma_o, q.shape(), k.shape(), v.shape(), o.shape(), problem.lse,
       problem.softmax_scale * sm90::kLog2e, problem.heads_q, cutlass::FastDivmod(heads_per_kv),
       Mask{problem.seqlen_q, problem.seqlen_k, problem.causal},
       TileScheduler::make_params(m_blocks, problem.heads_q, problem.batch, problem.causal)},
      problem.q_scale,
      problem.k_scale,
      problem.v_scale,
      problem.head_dim,
      problem.out_float16};

  auto kernel = fp8_forward_kernel<Traits, Params>;
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory");
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  int const grid = min(params.scheduler.tiles, problem.device.multiprocessors);
  kernel<<<grid, Traits::kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace cute_kernels::attention
