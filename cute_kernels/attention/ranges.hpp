#pragma once

#include <cstdint>
#include <optional>

#include "cute_kernels/attention/call.hpp"

// Which blocks a mask leaves to do, for kernels and for those who choose them: one arithmetic on
// the device and on the host. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

// By value, as std::min and std::max are not: on the device those read through a pointer.
constexpr int lesser(int a, int b) { return b < a ? b : a; }
constexpr int greater(int a, int b) { return a < b ? b : a; }

/// Of kColumns columns of an accumulator that a thread has, pairs 8 apart, a bit for each that lies
/// from `first` up to before `end`. On the device: two comparisons for each column would not leave
/// enough predicates.
template <int kColumns>
constexpr uint32_t columns_between(int first, int end) {
  static_assert(kColumns <= 32);
  auto before = [](int offset) {  // that many columns
    int const inside = lesser(greater(0, offset), 4 * kColumns);
    return inside / 8 * 2 + lesser(inside % 8, 2);
  };
  auto ones = [](int count) { return static_cast<uint32_t>((uint64_t{1} << count) - 1); };
  return ones(before(end)) & ~ones(before(first));
}

/// The blocks of keys that some queries see, or of queries that see some keys: those from `begin`
/// up to before `end`, of which those from `full_begin` up to before `full_end` need no mask (none,
/// where full_begin >= full_end). Forward walks from the last block to the first, so that the
/// diagonal's come first and a window's left end last.
struct BlockRange {
  int begin;
  int end;
  int full_begin;
  int full_end;

  constexpr bool has_full() const { return full_begin < full_end; }
  /// The masked blocks are those from `begin` up to before left_end(), and those from right_begin()
  /// up to before `end`; without a full block all are of the right end.
  constexpr int left_end() const { return has_full() ? full_begin : begin; }
  constexpr int right_begin() const { return has_full() ? full_end : begin; }
};

/// The block ranges of a mask. It has seqlen_q and seqlen_k; a query sees the keys from
/// first_key(query) up to before end_key(query), and a key is seen by the queries from
/// first_query(key) up to before end_query(key). None of these decreases. Without a left end
/// (kHasLeftEnd), where first_key and end_query do not exist, they cost nothing.
template <class Ranges>
struct MaskRanges {
  static constexpr int kNoQuery = 1 << 30;

  /// Some of the queries, or all, may lie before the first or behind the last.
  constexpr BlockRange key_blocks(int first_query, int queries, int block) const {
    int const last_query = lesser(first_query + queries, mask().seqlen_q) - 1;
    if (first_query > last_query || last_query < 0) return {0, 0, 0, 0};
    int const most = greater(0, mask().end_key(last_query));
    int const least = greater(0, mask().end_key(greater(0, first_query)));
    BlockRange range{0, blocks(most, block), 0, least / block};
    if constexpr (Ranges::kHasLeftEnd) {
      int const begin = mask().first_key(greater(0, first_query));
      if (begin >= most) return {0, 0, 0, 0};
      range.begin = begin / block;
      range.full_begin = blocks(mask().first_key(last_query), block);
    }
    return range;
  }

  /// The same of some of the queries that `all` is of: a part of it, though they see nothing.
  constexpr BlockRange key_blocks_of(BlockRange const& all, int first_query, int queries,
                                     int block) const {
    BlockRange part = key_blocks(first_query, queries, block);
    if constexpr (Ranges::kHasLeftEnd) {
      if (part.begin == part.end) part.begin = part.end = all.begin;
    }
    return part;
  }

  /// Some of the keys may lie behind the last one, where blocks are not full. Queries behind the
  /// last need no mask.
  constexpr BlockRange query_blocks(int first_key, int keys, int block) const {
    int const all_seen = mask().first_query(first_key + keys - 1);
    int const begin = mask().first_query(first_key);
    int const end = blocks(mask().seqlen_q, block);
    BlockRange range{begin / block, end, all_seen == kNoQuery ? kNoQuery : blocks(all_seen, block),
                     end};
    if constexpr (Ranges::kHasLeftEnd) {
      int const last_key = lesser(first_key + keys, mask().seqlen_k) - 1;
      int const most = lesser(mask().end_query(last_key), mask().seqlen_q);
      int const least = mask().end_query(first_key);
      if (begin >= most) return {0, 0, 0, 0};
      if (least < mask().seqlen_q) range.full_end = least / block;
      range.end = blocks(most, block);
    }
    return range;
  }

 private:
  constexpr Ranges const& mask() const { return static_cast<Ranges const&>(*this); }
  static constexpr int blocks(int rows, int block) { return (rows + block - 1) / block; }
};

/// What the kernels for dense calls know of a mask, decided at run time: a query sees all keys, or
/// those up to its own position (causal, bottom-right aligned). One kernel serves both.
struct CausalRanges : MaskRanges<CausalRanges> {
  static constexpr bool kHasLeftEnd = false;
  int seqlen_q;
  int seqlen_k;
  bool causal;

  /// May be negative.
  constexpr int end_key(int query) const {
    return causal ? lesser(seqlen_k, query + 1 + seqlen_k - seqlen_q) : seqlen_k;
  }

  constexpr int first_query(int key) const {
    if (key >= seqlen_k) return kNoQuery;
    return causal ? greater(0, key + seqlen_q - seqlen_k) : 0;
  }
};

/// Every mask: the keys that query 0 would see, were there no first and no last one, are those from
/// `left_edge` up to before `right_edge`.
struct WindowRanges : MaskRanges<WindowRanges> {
  static constexpr bool kHasLeftEnd = true;
  int seqlen_q;
  int seqlen_k;
  int left_edge;
  int right_edge;

  /// The diagonal that a call with such a mask has, of any sequence.
  constexpr WindowRanges(MaskSpec const& mask, int64_t diagonal, int seqlen_q, int seqlen_k)
      : WindowRanges(seqlen_q, seqlen_k, -seqlen_q, seqlen_k) {
    // Beyond these an edge is no edge, or hides all.
    auto edge = [&](int64_t at) {
      return static_cast<int>(at < -seqlen_q ? -seqlen_q : at > seqlen_k ? seqlen_k : at);
    };
    if (mask.left) left_edge = edge(diagonal - *mask.left);
    if (mask.right) right_edge = edge(diagonal + *mask.right + 1);
    if (left_edge >= right_edge) left_edge = right_edge = -seqlen_q;  // no query sees a key
  }

  constexpr WindowRanges(int seqlen_q, int seqlen_k, int left_edge, int right_edge)
      : seqlen_q(seqlen_q), seqlen_k(seqlen_k), left_edge(left_edge), right_edge(right_edge) {}

  /// Of a dense call's batch entries, or of a sequence that is as long as the call's longest.
  explicit constexpr WindowRanges(AttentionCall const& call)
      : WindowRanges(call.mask,
                     call.mask.diagonal.value_or(call.sizes.seqlen_k - call.sizes.seqlen_q),
                     call.sizes.seqlen_q, call.sizes.seqlen_k) {}

  constexpr int first_key(int query) const { return greater(0, query + left_edge); }
  constexpr int end_key(int query) const { return lesser(seqlen_k, query + right_edge); }
  constexpr int first_query(int key) const {
    return key >= seqlen_k ? kNoQuery : greater(0, key + 1 - right_edge);
  }
  constexpr int end_query(int key) const { return key + 1 - left_edge; }
};

/// What div() of cutlass::FastDivmod gives, on the host too.
struct PlainDivisor {
  int divisor;
  constexpr int div(int dividend) const { return dividend / divisor; }
};

/// The same of packed rows: row r of a sequence is a head's of query r / group, and seqlen_q counts
/// rows. The edges are those of queries.
template <class Divisor>
struct GroupedRanges : MaskRanges<GroupedRanges<Divisor>> {
  using Base = MaskRanges<GroupedRanges<Divisor>>;
  static constexpr bool kHasLeftEnd = true;
  int seqlen_q;
  int seqlen_k;
  int left_edge;
  int right_edge;
  Divisor group;

  constexpr GroupedRanges(int rows, int seqlen_k, int left_edge, int right_edge,
                          Divisor const& group)
      : seqlen_q(rows),
        seqlen_k(seqlen_k),
        left_edge(left_edge),
        right_edge(right_edge),
        group(group) {}

  constexpr int first_key(int row) const { return greater(0, group.div(row) + left_edge); }
  constexpr int end_key(int row) const { return lesser(seqlen_k, group.div(row) + right_edge); }
  constexpr int first_query(int key) const {
    return key >= seqlen_k ? Base::kNoQuery : first_row(key + 1 - right_edge);
  }
  constexpr int end_query(int key) const { return first_row(key + 1 - left_edge); }

 private:
  /// Or some row behind the last one.
  constexpr int first_row(int query) const {
    return lesser(greater(0, query), group.div(seqlen_q) + 1) * group.divisor;
  }
};

/// What the kernels for dense calls make of a call's mask; nothing where they do not read it:
/// windows and diagonals of one's own, but for those that are no mask or the causal one in other
/// words.
inline std::optional<CausalRanges> kernel_ranges(AttentionCall const& call) {
  if (call.is_packed()) return std::nullopt;
  WindowRanges const window(call);
  int const seqlen_q = window.seqlen_q, seqlen_k = window.seqlen_k;
  if (window.left_edge + seqlen_q - 1 > 0)
    return std::nullopt;  // the last query does not see key 0
  bool const causal = call.mask.right && window.right_edge == seqlen_k - seqlen_q + 1;
  if (!causal && window.right_edge < seqlen_k) return std::nullopt;
  return CausalRanges{{}, seqlen_q, seqlen_k, causal};
}

/// Forward. So many queries of a sequence are to share a load of K and V: with fewer, memory
/// traffic costs more than a better balance of the order gains. Measured on an H100.
inline constexpr int kQueriesForALoad = 384;

/// Forward. The first query of a tile, one of `tiles`. Where seqlen_q is no multiple of tile_m, the
/// first tile is the short one, because under a causal mask that is the one with the fewest keys:
/// its first warpgroups get negative queries and have nothing to do.
constexpr int first_query_of_tile(int seqlen_q, int tile_m, int tiles, int tile) {
  constexpr int kWarpgroupM = 64;
  int const padded = (seqlen_q + kWarpgroupM - 1) & -kWarpgroupM;
  return padded - (tiles - tile) * tile_m;
}

/// Forward. How many keys the tiles of a head visit.
struct VisitedKeys {
  double mean;   // of a query's tile
  double most;   // of a tile
  double least;  // of a query alone
};

/// Of a few tiles that stand for all: the first one, which may be short, and of the others, of
/// which the last may lack some queries, a few at equal distances, among them the last.
inline VisitedKeys visited_keys(WindowRanges const& ranges, int tile_m) {
  constexpr int kSamples = 8;
  int const tiles = (ranges.seqlen_q + tile_m - 1) / tile_m;
  int most = 0, least = ranges.seqlen_k;
  auto first_query = [&](int tile) {
    return first_query_of_tile(ranges.seqlen_q, tile_m, tiles, tile);
  };
  auto visited = [&](int query, int queries) {
    BlockRange const keys = ranges.key_blocks(query, queries, 1);
    return keys.end - keys.begin;
  };
  auto sample = [&](int tile) {
    int const keys = visited(first_query(tile), tile_m);
    most = greater(most, keys);
    least = lesser(least, visited(greater(0, first_query(tile)), 1));
    return keys;
  };
  // Over all queries.
  double sum = static_cast<double>(lesser(first_query(1), ranges.seqlen_q)) * sample(0);
  int const others = tiles - 1;
  int const samples = lesser(others, kSamples);
  if (samples > 0) {
    int const gaps = greater(1, samples - 1);
    double of_samples = 0;
    int last = 0;
    for (int i = 0; i < samples; ++i) {
      last = sample(1 + (i * (others - 1) + gaps / 2) / gaps);
      of_samples += last;
    }
    int const lacking = first_query(tiles) - ranges.seqlen_q;
    sum += of_samples / samples * others * tile_m - static_cast<double>(lacking) * last;
  }
  return {sum / greater(1, ranges.seqlen_q), static_cast<double>(most), static_cast<double>(least)};
}

}  // namespace cute_kernels::attention
