#pragma once

#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {

/// What Q and K are; P and V are always e4m3.
enum class ScoreType { kE4m3, kInt8 };

struct Fp8TileConfig : RowConfig<ScoreType> {
  int tile_m;
  bool linear_exp;
};

struct Fp8ForwardKernel {
  using Problem = Fp8ForwardProblem;
  static constexpr char const* kPass = "forward_fp8";
  Fp8TileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<Fp8ForwardKernel> fp8_forward_kernels;

}  // namespace cute_kernels::attention
