#pragma once

#include <optional>

#include "cute_kernels/attention/call.hpp"

// Which blocks a mask leaves to do, for kernels and for those who choose them: one arithmetic on
// the device and on the host. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

// By value, as std::min and std::max are not: on the device those read through a pointer.
constexpr int lesser(int a, int b) { return b < a ? b : a; }
constexpr int greater(int a, int b) { return a < b ? b : a; }

/// The key blocks that some consecutive queries visit, counted from key 0. The mainloop walks them
/// from the last to the first, so that the blocks that need a mask come first.
struct BlockRange {
  int visited;  // blocks with at least one visible key; 0 when no query sees any
  int full;     // how many of them, from key 0 on, every query sees whole
};

/// The query blocks that see some of a key block's keys, from `first` on. Those before `full` need
/// a mask.
struct QueryRange {
  int first;
  int full;
};

/// What a kernel knows of a call's mask, decided at run time: a query sees all keys, or those up to
/// its own position (causal, bottom-right aligned). One kernel serves both.
struct Visibility {
  int seqlen_q;
  int seqlen_k;
  bool causal;

  /// The number of keys, from key 0 on, that a query sees; may be negative.
  constexpr int visible_keys(int query) const {
    return causal ? lesser(seqlen_k, query + 1 + seqlen_k - seqlen_q) : seqlen_k;
  }

  /// Some of the queries, or all, may lie before the first or behind the last.
  constexpr BlockRange key_blocks(int first_query, int queries, int block) const {
    int const last_query = lesser(first_query + queries, seqlen_q) - 1;
    if (first_query > last_query || last_query < 0) return {0, 0};
    int const most = greater(0, visible_keys(last_query));
    int const least = greater(0, visible_keys(greater(0, first_query)));
    return {(most + block - 1) / block, least / block};
  }

  /// The first query that sees a key.
  constexpr int first_query(int key) const {
    if (key >= seqlen_k) return kNoQuery;
    return causal ? greater(0, key + seqlen_q - seqlen_k) : 0;
  }

  constexpr QueryRange query_blocks(int first_key, int keys, int block) const {
    int const all_seen = first_query(first_key + keys - 1);
    return {first_query(first_key) / block,
            all_seen == kNoQuery ? kNoQuery : (all_seen + block - 1) / block};
  }

  static constexpr int kNoQuery = 1 << 30;
};

/// What kernels make of a call's mask; nothing where none reads it yet: windows and diagonals of
/// one's own, but for those that are the causal mask in other words.
inline std::optional<Visibility> visibility(AttentionCall const& call) {
  CallSizes const& sizes = call.sizes;
  MaskSpec const& mask = call.mask;
  if (mask.left) return std::nullopt;
  if (!mask.right) return Visibility{sizes.seqlen_q, sizes.seqlen_k, false};
  int const bottom_right = sizes.seqlen_k - sizes.seqlen_q;
  if (mask.diagonal.value_or(bottom_right) + *mask.right != bottom_right) return std::nullopt;
  return Visibility{sizes.seqlen_q, sizes.seqlen_k, true};
}

/// Forward. The first query of a tile, one of `tiles`. Where seqlen_q is no multiple of tile_m, the
/// first tile is the short one, because under a causal mask that is the one with the fewest keys:
/// its first warpgroups get negative queries and have nothing to do.
constexpr int first_query_of_tile(int seqlen_q, int tile_m, int tiles, int tile) {
  constexpr int kWarpgroupM = 64;
  int const padded = (seqlen_q + kWarpgroupM - 1) & -kWarpgroupM;
  return padded - (tiles - tile) * tile_m;
}

}  // namespace cute_kernels::attention
