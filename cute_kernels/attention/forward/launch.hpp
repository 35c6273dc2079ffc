#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/forward/epilogue.hpp"
#include "cute_kernels/attention/forward/kernel.hpp"
#include "cute_kernels/attention/forward/mainloop.hpp"
#include "cute_kernels/attention/forward/start.hpp"
#include "cute_kernels/attention/forward/traits.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"

namespace cute_kernels::attention {

/// Starts the forward kernel of a tile on `stream`: TMA descriptors, grid, launch. Asynchronous.
template <class Tile>
cudaError_t launch_forward(ForwardProblem const& problem, cudaStream_t stream) {
  using namespace cute;
  using Traits = ForwardTraits<Tile>;
  using Element = typename Traits::Element;

  // A descriptor of no keys is not allowed; with seqlen_k = 0 nothing is loaded through it.
  int const keys = problem.seqlen_k > 0 ? problem.seqlen_k : 1;
  auto q = global_tensor<Element>(problem.q, problem.seqlen_q, problem.head_dim, problem.heads_q,
                                  problem.batch);
  auto k =
      global_tensor<Element>(problem.k, keys, problem.head_dim, problem.heads_kv, problem.batch);
  auto v =
      global_tensor<Element>(problem.v, keys, problem.head_dim, problem.heads_kv, problem.batch);
  auto o = global_tensor<Element>(problem.out, problem.seqlen_q, problem.head_dim, problem.heads_q,
                                  problem.batch);
  auto tma_q = make_tma_copy(SM90_TMA_LOAD{}, q, typename Traits::LayoutQ{});
  auto tma_k = make_tma_copy(SM90_TMA_LOAD{}, k, take<0, 2>(typename Traits::LayoutK{}));
  auto tma_v = make_tma_copy(SM90_TMA_LOAD{}, v, take<0, 2>(typename Traits::LayoutV{}));
  auto tma_o = make_tma_copy(SM90_TMA_STORE{}, o, typename Traits::LayoutO{});

  int const heads_per_kv = problem.heads_q / problem.heads_kv;
  int64_t const kv_bytes = int64_t{sizeof(Element)} * problem.batch * problem.heads_kv *
                           problem.seqlen_k * (2 * problem.head_dim);
  using Params =
      ForwardParams<Traits, decltype(tma_q), decltype(tma_k), decltype(tma_v), decltype(tma_o)>;
  Params const params{
      tma_q,
      tma_k,
      tma_v,
      tma_o,
      q.shape(),
      k.shape(),
      v.shape(),
      o.shape(),
      problem.v,
      problem.out,
      problem.lse,
      scale_of_scores(problem.softmax_scale) * sm90::kLog2e,
      problem.heads_q,
      cutlass::FastDivmod(heads_per_kv),
      Mask{problem.seqlen_q, problem.seqlen_k, problem.causal},
      TileScheduler::make_params(problem.seqlen_q, Traits::kTileM, problem.heads_q, problem.batch,
                                 problem.causal, kv_bytes, problem.device.multiprocessors)};

  return start_forward<Traits,
                       forward_kernel<ForwardMainloop<Traits>, ForwardEpilogue<Traits>, Params>>(
      params, problem.device, stream);
}

}  // namespace cute_kernels::attention
