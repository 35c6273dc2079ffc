#pragma once

#include <cutlass/fast_math.h>
#include <cute/arch/copy_sm90_desc.hpp>

#include "cute_kernels/attention/decode/problem.hpp"
#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/attention/schedule/list_scheduler.hpp"
#include "cute_kernels/sm90/opaque.hpp"

namespace cute_kernels::attention {

/// Calls to a cache, as a forward kernel knows them: a "query" is a row of a sequence, a tile's
/// head one of K and V.
template <int kNeighbours>
struct CacheCalls {
  using Scheduler = ListScheduler<kNeighbours>;
  using Tile = ListedTile;
  using Mask = TwoEndedMask<GroupedRanges<cutlass::FastDivmod>>;
  static constexpr bool kHasLeftEnd = Mask::kHasLeftEnd;

  typename Scheduler::Params scheduler;
  cutlass::FastDivmod group;  // query heads of a key head
  float const* sinks;         // (query heads), or null

  CUTLASS_DEVICE Mask mask_of(Tile const& tile) const {
    WorkTile const& at = work(tile);
    return Mask({at.sequence.seqlen_q, at.sequence.seqlen_k, at.left_edge, at.right_edge, group});
  }
  CUTLASS_DEVICE int first_query(Tile const& tile) const { return work(tile).first_row; }
  CUTLASS_DEVICE Sequence const& sequence(Tile const& tile) const { return work(tile).sequence; }

  /// A row of Q and O.
  struct Place {
    int query;  // of the tensors
    int head;
  };
  CUTLASS_DEVICE Place place_of(Tile const& tile, int row) const {
    int query, head;
    group(query, head, row);
    return {sequence(tile).row_q + query, tile.head * group.divisor + head};
  }

  /// -inf where there is none, or no such row.
  CUTLASS_DEVICE float sink(Tile const& tile, int row) const {
    return sinks == nullptr || row < 0 ? -INFINITY : sinks[place_of(tile, row).head];
  }

  CUTLASS_DEVICE static Tile forgotten(Tile tile) {
    tile.entry = sm90::opaque(tile.entry);
    return tile;
  }

 private:
  CUTLASS_DEVICE WorkTile const& work(Tile const& tile) const {
    return scheduler.tiles[tile.entry];
  }
};

/// What a prefill kernel is told at run time.
template <class Traits>
struct PrefillParams : Traits::Calls {
  // K and V in boxes of box_rows keys of one page each, (columns, slots, heads, pages) to TMA.
  cute::TmaDescriptor boxes_k;
  cute::TmaDescriptor boxes_v;
  int box_rows;
  CachePages pages;
  cutlass::FastDivmod page_size;
  TensorView q;
  CacheView v;
  int head_dim;
  int head_dim_v;
  int heads_q;
  int total_q;
  void* out;   // (total_q, heads_q, head_dim_v)
  float* lse;  // (heads_q, total_q)
  float scale_log2;

  CUTLASS_DEVICE void prefetch_descriptors() const {
    cute::prefetch_tma_descriptor(&boxes_k);
    cute::prefetch_tma_descriptor(&boxes_v);
  }

  /// Where a key of a sequence lies. A page that is not there is kNoPage, as TMA takes it.
  struct Slot {
    static constexpr int kNoPage = -1;
    int page;
    int slot;
  };
  CUTLASS_DEVICE Slot slot_of(Sequence const& sequence, int key) const {
    if (key >= sequence.seqlen_k) return {Slot::kNoPage, 0};
    Slot at{sequence.batch, sequence.row_k + key};
    if (pages.table != nullptr) {
      int page;
      page_size(page, at.slot, sequence.row_k + key);
      at.page = __ldg(pages.table + sequence.batch * pages.table_stride + page);
    } else if (pages.entries != nullptr) {
      at.page = __ldg(pages.entries + sequence.batch);
    }
    if (at.page < 0 || at.page >= pages.pages) at.page = Slot::kNoPage;
    return at;
  }

  /// The offset of its row from the view's first one, in elements; negative where it is not there.
  CUTLASS_DEVICE int64_t offset_of(CacheView const& view, int head, Slot const& at) const {
    if (at.page == Slot::kNoPage) return -1;
    return at.page * view.page_stride + at.slot * view.slot_stride + head * view.head_stride;
  }
};

}  // namespace cute_kernels::attention
