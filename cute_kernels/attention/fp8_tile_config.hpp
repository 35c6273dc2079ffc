#pragma once

#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {

/// What Q and K are; P and V are always e4m3.
enum class ScoreType { kE4m3, kInt8 };

struct Fp8TileConfig {
  char const* name;
  ScoreType dtype;
  int head_dim;  // the kernel takes head dims up to this one
  int tile_m;
};

struct Fp8ForwardKernel {
  using Problem = Fp8ForwardProblem;
  static constexpr char const* kPass = "forward_fp8";
  Fp8TileConfig config;
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<Fp8ForwardKernel> fp8_forward_kernels;

/// The last of the kernels with the smallest fitting head dim, as choose_backward; null where there
/// is none.
inline Fp8ForwardKernel const* choose_fp8_forward(ScoreType dtype, int head_dim) {
  Fp8ForwardKernel const* best = nullptr;
  for (Fp8ForwardKernel const& kernel : fp8_forward_kernels) {
    Fp8TileConfig const& config = kernel.config;
    if (config.dtype != dtype || config.head_dim < head_dim) continue;
    if (best == nullptr || config.head_dim <= best->config.head_dim) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
