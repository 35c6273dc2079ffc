#pragma once

#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {

/// What Q and K are; P and V are always e4m3.
enum class ScoreType { kE4m3, kInt8 };

struct Fp8TileConfig : RowConfig<ScoreType> {
  int tile_m;
};

struct Fp8ForwardKernel {
  Fp8TileConfig config;
  cudaError_t (*launch)(Fp8ForwardProblem const&, cudaStream_t);
};

extern Registry<Fp8ForwardKernel> const kFp8ForwardRegistry;

}  // namespace cute_kernels::attention
