#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/decode/workspace.hpp"
#include "cute_kernels/attention/latent/kernel.hpp"
#include "cute_kernels/attention/latent/problem.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::attention {

template <class Tile>
int64_t latent_workspace_bytes(LatentProblem const& problem) {
  using Traits = LatentTraits<Tile>;
  return DecodeWorkspace<Traits>(decode_ctas<Traits>(problem.device)).end;
}

/// Starts the kernel of a tile on `stream`. Asynchronous.
template <class Tile>
cudaError_t launch_latent(LatentProblem const& problem, cudaStream_t stream) {
  using Traits = LatentTraits<Tile>;
  constexpr bool kIsBFloat16 = std::is_same_v<typename Traits::Element, cutlass::bfloat16_t>;
  int const ctas = decode_ctas<Traits>(problem.device);
  LatentParams const params{problem.call,
                            {cache_source(problem), problem.qv, problem.heads_of_key},
                            score_units(problem.call),
                            decode_results<Traits>(problem, ctas, kIsBFloat16),
                            problem.num_splits};
  auto const how = decode_launch<Traits>(problem.device, ctas, stream);
  return sm90::launch_kernel<latent_kernel<Traits>>(how, params);
}

}  // namespace cute_kernels::attention
