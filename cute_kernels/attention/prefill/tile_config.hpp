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
  PrefillKernel const* prefill = nullptr;
  int const head_dim = std::max(call.head_dim, call.head_dim_v);
  for (PrefillKernel const& kernel : prefill_kernels) {
    if (kernel.config.dtype != dtype || kernel.config.head_dim < head_dim) continue;
    if (prefill == nullptr || kernel.config.head_dim <= prefill->config.head_dim) prefill = &kernel;
  }
  bool const takes = call.softcap == 0 && call.chunk == 0 && call.tree_mask == nullptr;
  if (prefill == nullptr || !takes) return {nullptr, decode};
  if (int64_t{longest} * call.group < CacheKernels::kLeastRows) return {nullptr, decode};
  int64_t const rows = int64_t{call.total_q} * call.group;
  double const tiles = static_cast<double>(rows) / prefill->config.tile_m * call.heads_kv;
  double const rounds = std::ceil(tiles / multiprocessors);
  bool const pays = tiles * kPrefillSpeed > rounds * multiprocessors;
  constexpr int64_t kMostPlaces = 1 << 29;  // of tiles, also of one warpgroup's rows, and heads
  bool const fits = (rows / 64 + call.batch) * call.heads_kv < kMostPlaces;
  if (!pays || !fits) return {nullptr, decode};
  bool const all_are_long = int64_t{longest} * call.batch <= call.total_q;
  return {prefill, all_are_long ? nullptr : decode};
}

}  // namespace cute_kernels::attention
