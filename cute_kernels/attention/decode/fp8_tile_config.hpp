#pragma once

#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/attention/decode/tile_config.hpp"

namespace cute_kernels::attention {

/// What caches hold; one kernel takes e4m3 and int8, and queries and outputs of any type.
enum class CacheType { kEightBits };

struct Fp8DecodeTileConfig : RowConfig<CacheType> {
  int tile_m;  // rows of a tile
  int tile_n;  // keys of a block
};

struct Fp8DecodeKernel {
  using Problem = Fp8DecodeProblem;
  static constexpr char const* kPass = "decode_fp8";
  Fp8DecodeTileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<Fp8DecodeKernel> fp8_decode_kernels;

}  // namespace cute_kernels::attention
