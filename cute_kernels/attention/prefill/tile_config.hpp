#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "cute_kernels/attention/decode/tile_config.hpp"
#include "cute_kernels/attention/prefill/boxes.hpp"

namespace cute_kernels::attention {

using PrefillProblem = DecodeProblem;

struct PrefillTileConfig : RowConfig<ElementType> {
  int tile_m;  // rows of a tile
  int tile_n;  // keys of a block
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

/// The kernels for a call none of whose sequences has more than `longest` queries, where that is
/// known. Which of them are that long only the device knows.
///
/// A decode kernel splits keys, so that it fills the GPU always; a prefill kernel's products are
/// kPrefillSpeed times as fast where its tiles fill all rounds, but rows that no box holds it would
/// have to gather, which was slower. A call is taken to be made of long sequences alone.
inline CacheKernels choose_for_cache(ElementType dtype, DecodeProblem const& problem,
                                     std::optional<int64_t> longest) {
  CachedCall const& call = problem.call;
  int const multiprocessors = problem.device.multiprocessors;
  constexpr double kPrefillSpeed = 1.75;
  int64_t const most = std::min<int64_t>(longest.value_or(call.total_q), call.total_q);
  int64_t const rows_at_most = rows_of_longest(call, longest);
  DecodeKernel const* const decode =
      choose_decode(decode_kernels, dtype, call, rows_at_most, mean_rows(call));
  PrefillKernel const* const prefill =
      choose_prefill(dtype, std::max(call.head_dim, call.head_dim_v));
  bool const takes = call.softcap == 0 && call.chunk == 0 && call.tree_mask == nullptr;
  if (prefill == nullptr || !takes) return {nullptr, decode};
  if (rows_of_boxes(problem, prefill->config.tile_n) == 0) return {nullptr, decode};
  if (most * call.group < CacheKernels::kLeastRows) return {nullptr, decode};
  int64_t const rows = int64_t{call.total_q} * call.group;
  double const tiles = static_cast<double>(rows) / prefill->config.tile_m * call.heads_kv;
  double const rounds = std::ceil(tiles / multiprocessors);
  bool const pays = tiles * kPrefillSpeed > rounds * multiprocessors;
  if (!pays || !prefill_fits(rows, call.batch, call.heads_kv)) return {nullptr, decode};
  bool const all_are_long = most * call.batch <= call.total_q;
  if (all_are_long) return {prefill, nullptr};
  // Those that are not long have one token, mostly.
  return {prefill, choose_decode(decode_kernels, dtype, call, rows_at_most, call.group)};
}

}  // namespace cute_kernels::attention
