#pragma once

#include "cute_kernels/attention/decode/problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {

struct DecodeTileConfig : RowConfig<ElementType> {
  int tile_m;  // rows of a tile
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
template <class Kernel, class Dtype>
Kernel const* choose_decode(KernelTable<Kernel> const& kernels, Dtype dtype,
                            CachedCall const& call) {
  int const head_dim = std::max(call.head_dim, call.head_dim_v);
  Kernel const* best = nullptr;
  for (Kernel const& kernel : kernels) {
    if (kernel.config.dtype != dtype || kernel.config.head_dim < head_dim) continue;
    if (best == nullptr || kernel.config.head_dim <= best->config.head_dim) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
