#pragma once

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/ranges.hpp"
#include "cute_kernels/attention/schedule/work_list.hpp"
#include "cute_kernels/attention/variant/arguments.hpp"

namespace cute_kernels::attention {

/// A dense call with a block mask as a WorkListBuilder sees it: a tile of queries is as long as the
/// list of its keys, of the first head for all.
struct ListedCall {
  AttentionCall call;
  int const* counts;  // BlockLists of queries; null: there are no keys
  int rows_of_batch;
};

constexpr ListedCall listed_call(AttentionCall const& call, BlockLists const& lists) {
  return {call, lists.counts, lists.rows_of_batch};
}

constexpr AttentionCall const& attention_call(ListedCall const& listed) { return listed.call; }

constexpr int sequences(ListedCall const& listed) { return sequences(listed.call); }

constexpr Sequence sequence_of(ListedCall const& listed, int entry) {
  return sequence_of(listed.call, entry);
}

struct ListedRanges : WindowRanges {
  int const* counts;  // of the units of a sequence's queries
};

constexpr ListedRanges ranges_of(ListedCall const& listed, Sequence const& sequence, int entry) {
  int const* const counts =
      listed.counts == nullptr ? nullptr : listed.counts + int64_t{listed.rows_of_batch} * entry;
  return {ranges_of(listed.call, sequence, entry), counts};
}

/// Tiles are the units of the mask's queries. Lists differ from tile to tile, so that neighbours
/// are no more alike than others.
template <int kTileM, int kTileN>
struct ListedTiling : QueryTiling<kTileM, kTileN> {
  static_assert(kTileM == kMaskUnit);

  static constexpr int first_row(Sequence const&, int tile) { return tile * kTileM; }
  static constexpr int last_neighbour(int tile, int) { return tile; }
  static constexpr int length(ListedRanges const& ranges, int first_row) {
    return ranges.counts == nullptr ? 0 : ranges.counts[first_row / kTileM];
  }
};

}  // namespace cute_kernels::attention
