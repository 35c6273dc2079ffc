#pragma once

#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/ranges.hpp"

// What a WorkListBuilder asks of calls to a cache. The query heads of a key head share a tile's
// rows: row r of a sequence is its query r / group, head r % group of the group. Nothing here needs
// a CUDA compiler.
namespace cute_kernels::attention {

constexpr int sequences(CachedCall const& call) { return call.batch; }

/// Its rows, of the query row_q on. Keys are counted from behind the left padding, which is row_k.
constexpr Sequence sequence_of(CachedCall const& call, int entry) {
  CachedSequence const sequence = cached_sequence(call, entry);
  return {entry, sequence.row_q, sequence.first_key, sequence.rows(),
          sequence.ranges.seqlen_k - sequence.first_key};
}

constexpr GroupedRanges<PlainDivisor> ranges_of(CachedCall const& call, Sequence const& sequence,
                                                int /*entry*/) {
  int const queries = sequence.seqlen_q / call.group;
  WindowRanges const ranges(call.mask, sequence.seqlen_k - queries, queries, sequence.seqlen_k);
  return {sequence.seqlen_q, sequence.seqlen_k, ranges.left_edge, ranges.right_edge,
          PlainDivisor{call.group}};
}

/// How many tiles of tile_m rows a call may have, for each key head.
constexpr int64_t most_tiles(CachedCall const& call, int tile_m) {
  return int64_t{call.total_q} * call.group / tile_m + call.batch;
}

}  // namespace cute_kernels::attention
