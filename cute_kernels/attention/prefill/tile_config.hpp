#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cute_kernels/attention/decode/tile_config.hpp"

namespace cute_kernels::attention {

using PrefillProblem = DecodeProblem;

struct PrefillTileConfig : RowConfig<ElementType> {
  int tile_m;  // rows of a tile
};

/// Of attention of many queries to a cache: of sequences whose rows (queries * group) fill tiles of
/// the forward pass's kind.
struct PrefillKernel {
  using Problem = PrefillProblem;
  static constexpr char const* kPass = "prefill";
  PrefillTileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<PrefillKernel> prefill_kernels;

/// The last of the kernels with the smallest fitting head dim; null where there is none.
inline PrefillKernel const* choose_prefill(ElementType dtype, int head_dim) {
  PrefillKernel const* best = nullptr;
  for (PrefillKernel const& kernel : prefill_kernels) {
    if (kernel.config.dtype != dtype || kernel.config.head_dim < head_dim) continue;
    if (best == nullptr || kernel.config.head_dim <= best->config.head_dim) best = &kernel;
  }
  return best;
}

/// Whether a work list of so many rows fits, also in tiles of one warpgroup's.
inline bool prefill_fits(int64_t rows, int64_t batch, int64_t heads_kv) {
  return rows < 1 << 30 && (rows / 64 + batch) * heads_kv < 1 << 29;
}

/// Whose the sequences of a call are: the prefill kernel's from so many rows on, the decode
/// kernel's below. Without the one the other has all of them.
struct CacheKernels {
  PrefillKernel const* prefill;
  DecodeKernel const* decode;

  static constexpr int kLeastRows = 129;  // more than a decode kernel's tile has
};

/// The kernels for a call none of whose sequences has more than `longest` queries. Which of them
/// are that long only the device knows.
///
/// A decode kernel splits keys, so that it fills the GPU always; a prefill kernel's products are
/// kPrefillSpeed times as fast where its tiles fill all rounds. A call is taken to be made of long
/// sequences alone.
inline CacheKernels choose_for_cache(ElementType dtype, CachedCall const& call, int longest,
                                     int multiprocessors) {
  constexpr double kPrefillSpeed = 1.75;
  DecodeKernel const* const decode = choose_decode(decode_kernels, dtype, call);
  PrefillKernel const* const prefill =
      choose_prefill(dtype, std::max(call.head_dim, call.head_dim_v));
  bool const takes = call.softcap == 0 && call.chunk == 0 && call.tree_mask == nullptr;
  if (prefill == nullptr || !takes) return {nullptr, decode};
  if (int64_t{longest} * call.group < CacheKernels::kLeastRows) return {nullptr, decode};
  int64_t const rows = int64_t{call.total_q} * call.group;
  double const tiles = static_cast<double>(rows) / prefill->config.tile_m * call.heads_kv;
  double const rounds = std::ceil(tiles / multiprocessors);
  bool const pays = tiles * kPrefillSpeed > rounds * multiprocessors;
  if (!pays || !prefill_fits(rows, call.batch, call.heads_kv)) return {nullptr, decode};
  bool const all_are_long = int64_t{longest} * call.batch <= call.total_q;
  return {prefill, all_are_long ? nullptr : decode};
}

/// The kernel for a call without a cache that any_call rows would take, where heads that share
/// tiles see less that others do not: with a window, a tile of few queries visits fewer keys. Null
/// elsewhere.
inline PrefillKernel const* choose_grouped(ElementType dtype, AttentionCall call) {
  constexpr double kLeastGain = 1.15;
  constexpr double kOverhead = 170;  // of a tile, in keys
  constexpr int kTile = 192, kSmallTile = 64;
  CallSizes& sizes = call.sizes;
  int const group = sizes.heads_q / std::max(1, sizes.heads_kv);
  if (group < 2 || call.softcap > 0.f) return nullptr;
  if (call.mask.diagonal || call.packed.diagonal != nullptr) return nullptr;
  if (kernel_ranges(call).has_value() && call.sinks == nullptr) return nullptr;
  int const head_dim = std::max(sizes.head_dim, sizes.head_dim_v);
  PrefillKernel const* const kernel = choose_prefill(dtype, head_dim);
  if (kernel == nullptr || kernel->config.head_dim != head_dim) return nullptr;
  int64_t const queries =
      call.is_packed() ? int64_t{call.packed.total_q} : int64_t{sizes.batch} * sizes.seqlen_q;
  if (!prefill_fits(queries * group, sizes.batch, sizes.heads_kv)) return nullptr;
  set_mean_lengths(call);
  WindowRanges const ranges(call);
  double const visited = visited_keys(ranges, kTile).mean;
  double const of_small_tile = visited_keys(ranges, kSmallTile).mean;
  double const of_query = (visited - of_small_tile) / (kTile - kSmallTile);
  double const grouped = of_small_tile - of_query * (kSmallTile - kTile / group);
  return visited + kOverhead > kLeastGain * (grouped + kOverhead) ? kernel : nullptr;
}

}  // namespace cute_kernels::attention
