#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cute_kernels/attention/decode/problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {

struct DecodeTileConfig : RowConfig<ElementType> {
  int tile_m;      // rows of a tile
  int tile_n;      // keys of a block
  int heads;       // key heads of a tile, which have as many of its rows each
  int least_rows;  // in the mean, of a call's sequences
};

struct DecodeKernel {
  using Problem = DecodeProblem;
  static constexpr char const* kPass = "decode";
  DecodeTileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<DecodeKernel> decode_kernels;

/// The most rows (queries * group) of a sequence, as far as the host knows: `longest` is at least
/// the longest one's queries, or unknown; then all are taken to be alike.
inline int64_t rows_of_longest(CachedCall const& call, std::optional<int64_t> longest) {
  int64_t const batch = std::max(call.batch, 1);
  int64_t const alike = (call.total_q + batch - 1) / batch;
  return std::min<int64_t>(longest.value_or(alike), call.total_q) * call.group;
}

/// The rows of a sequence in the mean, of those that have any.
inline int64_t mean_rows(CachedCall const& call) {
  int64_t const batch = std::max(call.batch, 1);
  return (int64_t{call.total_q} * call.group + batch - 1) / batch;
}

/// The last of the kernels with the smallest fitting head dim; null where there is none. One with
/// several heads in a tile is for calls whose key heads it divides, none of whose sequences has
/// more rows than it has of each: of more it would read keys once for each tile. `mean`: the rows
/// of most of the sequences, by which one for few or many is chosen.
inline DecodeKernel const* choose_decode(KernelTable<DecodeKernel> const& kernels,
                                         ElementType dtype, CachedCall const& call, int64_t rows,
                                         int64_t mean) {
  int const head_dim = std::max(call.head_dim, call.head_dim_v);
  DecodeKernel const* best = nullptr;
  for (DecodeKernel const& kernel : kernels) {
    DecodeTileConfig const& config = kernel.config;
    if (config.dtype != dtype || config.head_dim < head_dim) continue;
    if (mean < config.least_rows) continue;
    if (config.heads > 1) {
      if (call.heads_kv % config.heads != 0 || rows > config.tile_m / config.heads) continue;
    }
    if (best == nullptr || config.head_dim <= best->config.head_dim) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
