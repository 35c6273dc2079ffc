#pragma once

#include "cute_kernels/attention/latent/problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {

struct LatentTileConfig : RowConfig<ElementType> {
  int tile_m;  // rows of a tile
  int tile_n;  // keys of a block
};

struct LatentKernel {
  using Problem = LatentProblem;
  static constexpr char const* kPass = "latent";
  LatentTileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<LatentKernel> latent_kernels;

/// The last of the kernels that fit; null where there is none.
inline LatentKernel const* choose_latent(ElementType dtype, CachedCall const& call) {
  LatentKernel const* best = nullptr;
  for (LatentKernel const& kernel : latent_kernels) {
    LatentTileConfig const& config = kernel.config;
    bool const fits = config.head_dim >= call.head_dim && config.head_dim_v >= call.head_dim_v;
    if (config.dtype == dtype && fits) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
