#pragma once

#include <cuda_runtime_api.h>

#include "cute_kernels/attention/problem.hpp"

// What the dispatcher knows of the compiled kernels. Filled by cmake/tile_configs.py from
// tile_configs.toml.
namespace cute_kernels::attention {

enum class ElementType { kFloat16, kBFloat16 };

/// Which calls the automatic choice may give to a kernel; each kernel answers every mask when asked
/// for by index.
enum class MaskClass { kAny, kFull, kCausal };

/// The columns of a row that decide whether a kernel can take a call.
struct TileConfig {
  char const* name;
  ElementType dtype;
  int head_dim;  // the kernel takes head dims up to this one
  int head_dim_v;
  MaskClass mask;
  int tile_m;  // queries of one CTA
};

struct ForwardKernel {
  TileConfig config;
  cudaError_t (*launch)(ForwardProblem const&, cudaStream_t);
};

/// All kernels of this build in the order of the table; tile_configs.json lists the same rows.
struct ForwardRegistry {
  ForwardKernel const* kernels;
  int count;

  ForwardKernel const* begin() const { return kernels; }
  ForwardKernel const* end() const { return kernels + count; }
};

extern ForwardRegistry const kForwardRegistry;

/// The first of the smallest fitting head dim whose mask class allows the call; null where there is
/// none.
inline ForwardKernel const* choose_forward(ElementType dtype, int head_dim, bool causal) {
  MaskClass const wanted = causal ? MaskClass::kCausal : MaskClass::kFull;
  ForwardKernel const* best = nullptr;
  for (ForwardKernel const& kernel : kForwardRegistry) {
    TileConfig const& config = kernel.config;
    if (config.dtype != dtype || config.head_dim < head_dim) continue;
    if (config.mask != MaskClass::kAny && config.mask != wanted) continue;
    if (best == nullptr || config.head_dim < best->config.head_dim) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
