#pragma once

#include "cute_kernels/attention/decode/problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {

struct DecodeTileConfig : RowConfig<ElementType> {
  int tile_n;  // keys of a block
};

struct DecodeKernel {
  using Problem = DecodeProblem;
  static constexpr char const* kPass = "decode";
  DecodeTileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<DecodeKernel> decode_kernels;

/// The last of the kernels with the smallest fitting head dim; null where there is none.
inline DecodeKernel const* choose_decode(ElementType dtype, CachedCall const& call) {
  int const head_dim = std::max(call.head_dim, call.head_dim_v);
  DecodeKernel const* best = nullptr;
  for (DecodeKernel const& kernel : decode_kernels) {
    if (kernel.config.dtype != dtype || kernel.config.head_dim < head_dim) continue;
    if (best == nullptr || kernel.config.head_dim <= best->config.head_dim) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
