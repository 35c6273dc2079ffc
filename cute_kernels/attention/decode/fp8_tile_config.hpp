#pragma once

#include <algorithm>
#include <cstdint>

#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/attention/decode/tile_config.hpp"

namespace cute_kernels::attention {

/// What caches hold; one kernel takes e4m3 and int8, and queries and outputs of any type.
enum class CacheType { kEightBits };

struct Fp8DecodeTileConfig : RowConfig<CacheType> {
  int tile_m;      // rows of a tile
  int tile_n;      // keys of a block
  int least_rows;  // in the mean, of a call's sequences
};

struct Fp8DecodeKernel {
  using Problem = Fp8DecodeProblem;
  static constexpr char const* kPass = "decode_fp8";
  Fp8DecodeTileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<Fp8DecodeKernel> fp8_decode_kernels;

/// Of the kernels with the smallest fitting head dim the last one with the smallest tile that holds
/// `rows` rows (queries * group), or with the largest tile there is; null where there is none. Each
/// is right for all calls: of more rows a sequence has several tiles. `mean`: the rows of most of
/// the sequences, as of choose_decode().
inline Fp8DecodeKernel const* choose_fp8_decode(KernelTable<Fp8DecodeKernel> const& kernels,
                                                CachedCall const& call, int64_t rows,
                                                int64_t mean) {
  int const head_dim = std::max(call.head_dim, call.head_dim_v);
  auto const is_chosen = [&](Fp8DecodeTileConfig const& config, Fp8DecodeTileConfig const& best) {
    if (config.head_dim != best.head_dim) return config.head_dim < best.head_dim;
    if (config.tile_m > best.tile_m) return rows > best.tile_m;
    return config.tile_m == best.tile_m || rows <= config.tile_m;
  };
  Fp8DecodeKernel const* best = nullptr;
  for (Fp8DecodeKernel const& kernel : kernels) {
    if (kernel.config.head_dim < head_dim || mean < kernel.config.least_rows) continue;
    if (best == nullptr || is_chosen(kernel.config, best->config)) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
