#pragma once

#include <cstdint>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/ranges.hpp"
#include "cute_kernels/attention/schedule/work_list.hpp"

// Forward with a window so short that all keys that a warpgroup's rows see are one block. The query
// heads of a key head share a tile: row r of a sequence is its query r / group, head r % group of
// the group. So 64 rows are of few queries, and see few keys more than one of them. Nothing here
// needs a CUDA compiler.
namespace cute_kernels::attention {

/// Where keys of a tile lie for its warpgroups. The tile's keys are one run of rows in shared
/// memory; each warpgroup's block is the tile_n of them that begin at a multiple of kKeyStep, which
/// is the swizzle's period and so what WGMMA may begin at. P V takes kValueStep keys at a time:
/// some behind a block, whose P is 0, may be among them.
struct WindowKeys {
  static constexpr int kKeyStep = 8;
  static constexpr int kValueStep = 16;
  static constexpr int kWarpgroupM = 64;
  // A warpgroup has so many queries at most: groups of four heads or more.
  static constexpr int kMostQueries = 16;

  int queries;  // of a warpgroup, a power of two
  int tile_n;   // keys of its block, a multiple of kKeyStep

  /// Of the warpgroup that begins so many queries behind the tile's first: how many of the tile's
  /// keys stand before its block.
  static constexpr int shift(int queries_before) { return queries_before / kKeyStep * kKeyStep; }

  /// By how much less than its queries a warpgroup's block may be shifted.
  constexpr int lag() const { return queries < kKeyStep ? kKeyStep - queries : 0; }

  /// How many keys a block needs for queries that see `window` each.
  constexpr int64_t needed(int64_t window) const { return window + queries - 1 + lag(); }

  /// The keys of a block and what P V takes beside them.
  static constexpr int values(int tile_n) {
    return (tile_n + kValueStep - 1) / kValueStep * kValueStep;
  }

  /// The keys of a tile of so many warpgroups.
  constexpr int of_tile(int warpgroups) const {
    return values(tile_n) + shift((warpgroups - 1) * queries);
  }

  /// The number, in the sequence, of a tile's first key. Blocks end with the last key that a query
  /// of theirs sees, or up to lag() behind it. May be negative.
  constexpr int first(int first_query, int right_edge) const {
    return first_query + queries - 1 + right_edge + lag() - tile_n;
  }
};

/// Which calls such a kernel takes, of blocks of tile_n keys.
constexpr bool fits_window(AttentionCall const& call, int tile_n) {
  CallSizes const& sizes = call.sizes;
  if (!call.mask.left || !call.mask.right || sizes.heads_kv <= 0 || sizes.heads_q <= 0)
    return false;
  int const group = sizes.heads_q / sizes.heads_kv;
  constexpr int kRows = WindowKeys::kWarpgroupM;
  if (group * WindowKeys::kMostQueries < kRows || group > kRows || kRows % group != 0) return false;
  WindowKeys const keys{kRows / group, tile_n};
  int64_t const window = int64_t{*call.mask.left} + *call.mask.right + 1;
  return keys.needed(window > 0 ? window : 0) <= tile_n &&
         int64_t{tensor_rows_q(call)} * group < 1 << 30;
}

/// The call as a WorkListBuilder sees it: rows rather than queries. Edges are those of queries.
struct GroupedCall {
  AttentionCall call;
  int group_log2;
};

/// Of a call that fits_window().
constexpr GroupedCall grouped_call(AttentionCall const& call) {
  GroupedCall grouped{call, 0};
  while (call.sizes.heads_kv << grouped.group_log2 < call.sizes.heads_q) ++grouped.group_log2;
  return grouped;
}

constexpr AttentionCall const& attention_call(GroupedCall const& grouped) { return grouped.call; }

constexpr int sequences(GroupedCall const& grouped) { return sequences(grouped.call); }

constexpr Sequence sequence_of(GroupedCall const& grouped, int entry) {
  Sequence sequence = sequence_of(grouped.call, entry);
  sequence.seqlen_q <<= grouped.group_log2;
  return sequence;
}

constexpr WindowRanges ranges_of(GroupedCall const& grouped, Sequence sequence, int entry) {
  sequence.seqlen_q >>= grouped.group_log2;
  return ranges_of(grouped.call, sequence, entry);
}

/// Tiles of kRows rows from a sequence's first on. Each takes as long as any other: they stay in
/// the order of the sequences.
template <int kRows>
struct RowTiling {
  static constexpr bool kNumbersSequences = false;

  static constexpr int count(Sequence const& sequence) {
    return (sequence.seqlen_q + kRows - 1) / kRows;
  }
  static constexpr int first_row(Sequence const&, int tile) { return tile * kRows; }
  template <class Ranges>
  static constexpr int length(Ranges const&, int) {
    return 1;
  }
  static constexpr int last_neighbour(int tile, int) { return tile; }
};

/// How many tiles a list may have.
constexpr int64_t most_tiles(GroupedCall const& grouped, int rows) {
  int64_t const batch = sequences(grouped.call);
  int64_t const all = int64_t{tensor_rows_q(grouped.call)} << grouped.group_log2;
  return grouped.call.is_packed() ? all / rows + batch : batch * ((all + rows - 1) / rows);
}

/// What a consumer knows of a tile. Queries and keys are counted from its first.
struct alignas(16) SeenTile {
  int queries;  // that the sequence has from the tile's first on; none: there is no other tile
  int row;      // of the tile's first query, in the tensors
  int batch;    // entry of the tensors
  int head_kv;
  int left_edge;   // the keys that the tile's first query would see, were there no first key
  int right_edge;  // and no last one
  int first_key;   // the sequence's
  int end_key;

  /// The keys that a query sees are those from here on,
  constexpr int first_seen(int query) const { return greater(left_edge + query, first_key); }
  /// up to before here; none, if that is not behind the first.
  constexpr int end_seen(int query) const { return lesser(right_edge + query, end_key); }
};

/// Of a key head.
constexpr SeenTile seen_tile(WorkTile const& tile, int group_log2, WindowKeys const& keys,
                             int head_kv) {
  int const query = tile.first_row >> group_log2;
  int const key = keys.first(query, tile.right_edge);
  return {(tile.sequence.seqlen_q >> group_log2) - query,
          tile.sequence.row_q + query,
          tile.sequence.batch,
          head_kv,
          query + tile.left_edge - key,
          query + tile.right_edge - key,
          -key,
          tile.sequence.seqlen_k - key};
}

}  // namespace cute_kernels::attention
