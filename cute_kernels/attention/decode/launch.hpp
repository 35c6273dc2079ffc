#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/decode/kernel.hpp"
#include "cute_kernels/attention/decode/workspace.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::attention {

template <class Traits>
int64_t bytes_of_decode_workspace(DecodeProblem const& problem) {
  return DecodeWorkspace<Traits>(decode_ctas<Traits>(problem.device)).end;
}

template <class Tile>
int64_t decode_workspace_bytes(DecodeProblem const& problem) {
  return bytes_of_decode_workspace<DecodeTraits<Tile>>(problem);
}

template <class Traits>
cudaError_t launch_decode_kernel(DecodeProblem const& problem,
                                 typename Traits::Format const& format, bool out_is_bfloat16,
                                 cudaStream_t stream) {
  int const ctas = decode_ctas<Traits>(problem.device);
  CachedCall call = problem.call;
  call.heads_kv /= Traits::kHeads;  // so many as the line of work has
  DecodeParams<Traits> const params{call,
                                    cache_source(problem),
                                    score_units(problem.call),
                                    decode_results<Traits>(problem, ctas, out_is_bfloat16),
                                    problem.num_splits,
                                    format};
  auto const how = decode_launch<Traits>(problem.device, ctas, stream);
  return sm90::launch_kernel<decode_kernel<Traits>>(how, params);
}

/// Starts the kernel of a tile on `stream`. Asynchronous.
template <class Tile>
cudaError_t launch_decode(DecodeProblem const& problem, cudaStream_t stream) {
  using Traits = DecodeTraits<Tile>;
  constexpr bool kIsBFloat16 = std::is_same_v<typename Traits::Element, cutlass::bfloat16_t>;
  return launch_decode_kernel<Traits>(problem, {}, kIsBFloat16, stream);
}

}  // namespace cute_kernels::attention
