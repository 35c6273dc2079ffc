#pragma once

#include "cute_kernels/attention/decode/fp8_traits.hpp"
#include "cute_kernels/attention/decode/launch.hpp"

namespace cute_kernels::attention {

template <class Tile>
int64_t fp8_decode_workspace_bytes(Fp8DecodeProblem const& problem) {
  return bytes_of_decode_workspace<Fp8DecodeTraits<Tile>>(problem);
}

/// Starts the kernel of a tile on `stream`. Asynchronous.
template <class Tile>
cudaError_t launch_fp8_decode(Fp8DecodeProblem const& problem, cudaStream_t stream) {
  EightBits const& format = problem.format;
  return launch_decode_kernel<Fp8DecodeTraits<Tile>>(problem, format, format.out_is_bfloat16,
                                                     stream);
}

}  // namespace cute_kernels::attention
