#pragma once

#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/ranges.hpp"

// What a WorkListBuilder asks of calls to a cache. The query heads of a key head share a tile's
// rows: row r of a sequence is its query r / group, head r % group of the group. Nothing here needs
// a CUDA compiler.
namespace cute_kernels::attention {

constexpr int sequences(CachedCall const& call) { return call.batch; }

/// Its rows, of the query row_q on; its keys, counted from row_k of its pages on, which a cache's
/// left padding comes before. `batch` is its number in the page table, or its page.
constexpr Sequence sequence_of(CachedCall const& call, int entry) {
  UncachedLengths const& uncached = call.uncached;
  if (uncached.is_dense) {
    int const queries = call.total_q / call.batch;
    return {entry, entry * queries, 0, queries * call.group, call.most_keys};
  }
  if (uncached.cu_seqlens_k != nullptr) {
    RowSpan const q =
        packed_rows(call.lengths.cu_seqlens_q, uncached.seqused_q, call.total_q, entry);
    RowSpan const k = packed_rows(uncached.cu_seqlens_k, uncached.seqused_k, call.most_keys, entry);
    return {0, q.first, k.first, q.count * call.group, k.count};
  }
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
