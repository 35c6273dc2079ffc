#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "cute_kernels/attention/forward/epilogue.hpp"
#include "cute_kernels/attention/forward/fp8_mainloop.hpp"
#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/attention/forward/kernel.hpp"
#include "cute_kernels/attention/forward/start.hpp"
#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/global_tensor.hpp"

namespace cute_kernels::attention {

/// What an FP8 forward kernel is told at run time beside what every forward kernel is. To TMA, V is
/// (head_dim, keys, heads, batch).
template <class Traits, class TmaQ, class TmaK, class TmaV, class TmaO>
struct Fp8ForwardParams : ForwardParams<Traits, TmaQ, TmaK, TmaV, TmaO> {
  ScaleView q_scale;
  ScaleView k_scale;
  ScaleView v_scale;
  int head_dim;
  bool out_float16;
};

/// A softmax scale beyond it does as well as that: the largest score has all the weight, and scores
/// stay finite.
inline constexpr float kLargestScale = 0x1p64f;

/// Starts the FP8 forward kernel of a tile on `stream`: TMA descriptors, grid, launch.
/// Asynchronous.
template <class Tile>
cudaError_t launch_fp8_forward(Fp8ForwardProblem const& problem, cudaStream_t stream) {
  using namespace cute;
  using Traits = Fp8ForwardTraits<Tile>;

  using ElementQk = typename Traits::ElementQk;
  // A descriptor of no keys is not allowed; with seqlen_k = 0 nothing is loaded through it.
  int const keys = problem.seqlen_k > 0 ? problem.seqlen_k : 1;
  int const padded_keys = (keys + 15) / 16 * 16;
  auto q = global_tensor<ElementQk>(problem.q, problem.seqlen_q, problem.head_dim, problem.heads_q,
                                    problem.batch);
  auto k =
      global_tensor<ElementQk>(problem.k, keys, problem.head_dim, problem.heads_kv, problem.batch);
  auto v = global_tensor<typename Traits::ElementPv>(problem.v, problem.head_dim, padded_keys,
                                                     problem.heads_kv, problem.batch);
  auto o = global_tensor<typename Traits::Output>(problem.out, problem.seqlen_q, problem.head_dim,
                                                  problem.heads_q, problem.batch);
  auto tma_q = make_tma_copy(SM90_TMA_LOAD{}, q, typename Traits::LayoutQ{});
  auto tma_k = make_tma_copy(SM90_TMA_LOAD{}, k, take<0, 2>(typename Traits::LayoutK{}));
  auto tma_v = make_tma_copy(SM90_TMA_LOAD{}, v, typename Traits::LayoutValueLoad{});
  auto tma_o = make_tma_copy(SM90_TMA_STORE{}, o, typename Traits::LayoutO{});

  int const heads_per_kv = problem.heads_q / problem.heads_kv;
  int64_t const kv_bytes =
      int64_t{2} * problem.batch * problem.heads_kv * problem.seqlen_k * problem.head_dim;
  using Params =
      Fp8ForwardParams<Traits, decltype(tma_q), decltype(tma_k), decltype(tma_v), decltype(tma_o)>;
  Params const params{
      {tma_q, tma_k, tma_v, tma_o, q.shape(), k.shape(), v.shape(), o.shape(), problem.v,
       problem.out, problem.lse, std::min(problem.softmax_scale, kLargestScale) * sm90::kLog2e,
       problem.heads_q, cutlass::FastDivmod(heads_per_kv),
       Mask{problem.seqlen_q, problem.seqlen_k, problem.causal},
       TileScheduler::make_params(problem.seqlen_q, Traits::kTileM, problem.heads_q, problem.batch,
                                  problem.causal, kv_bytes, problem.device.multiprocessors)},
      problem.q_scale,
      problem.k_scale,
      problem.v_scale,
      problem.head_dim,
      problem.out_float16};

  return start_forward<Traits, forward_kernel<Fp8ForwardMainloop<Traits>,
                                              ForwardEpilogue<typename Traits::Epilogue>, Params>>(
      params, problem.device, stream, problem.overlaps);
}

}  // namespace cute_kernels::attention
