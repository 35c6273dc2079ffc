#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "cute_kernels/attention/forward/fp8_mainloop.hpp"
#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/attention/forward/start.hpp"
#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"

namespace cute_kernels::attention {

/// What an FP8 forward kernel is told at run time beside what every forward kernel is. To TMA, V is
/// (head_dim_v, keys, heads, batch).
template <class CommonParams>
struct Fp8ForwardParams : CommonParams {
  ScaleView q_scale;
  ScaleView k_scale;
  ScaleView v_scale;
  int head_dim_v;  // channels that have a scale
  bool out_float16;
};

/// The memory that a launch needs.
template <class Tile>
int64_t fp8_forward_workspace_bytes(Fp8ForwardProblem const& problem) {
  return work_bytes<Fp8ForwardTraits<Tile>>(problem);
}

/// Starts the FP8 forward kernel of a tile on `stream`: TMA descriptors, grid, launch; before it,
/// where the kernel takes any call, the one that prepares its work. Asynchronous.
template <class Tile>
cudaError_t launch_fp8_forward(Fp8ForwardProblem const& problem, cudaStream_t stream) {
  using Traits = Fp8ForwardTraits<Tile>;
  float const scale_log2 = scale_of_fp8_scores(problem.call.scale) * sm90::kLog2e;
  using CommonParams = decltype(forward_params<Traits>(problem, scale_log2));
  Fp8ForwardParams<CommonParams> params{};
  static_cast<CommonParams&>(params) = forward_params<Traits>(problem, scale_log2);
  params.q_scale = problem.q_scale;
  params.k_scale = problem.k_scale;
  params.v_scale = problem.v_scale;
  // Nobody has made scales of no keys, and O is multiplied by those that are read.
  params.head_dim_v = tensor_rows_k(problem.call) > 0 ? problem.call.sizes.head_dim_v : 0;
  params.out_float16 = problem.out_float16;
  if constexpr (Traits::kAnyCall) {
    params.is_packed = problem.call.is_packed();
    params.exact_lse = problem.exact_lse;
    params.score_offset = problem.score_offset;
    cudaError_t const status = start_listing_work<Traits>(problem, stream, problem.overlaps);
    if (status != cudaSuccess) return status;
  }
  return start_forward<Fp8ForwardMainloop<Traits>>(params, problem, stream,
                                                   Traits::kAnyCall || problem.overlaps);
}

}  // namespace cute_kernels::attention
