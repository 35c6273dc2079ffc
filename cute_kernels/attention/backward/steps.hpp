#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/mask.hpp"

namespace cute_kernels::attention {

/// The work of one CTA: kTileN keys of one KV head of one batch entry, and the query heads and
/// blocks that see them.
struct KeyBlockCoord {
  int n_block;
  int kv_head;
  int batch;
};

/// The steps of a CTA in the one order that all its warps keep: the query heads of the group, and
/// for each the query blocks that see the keys.
///
/// CTAs of one head start together, so each begins at another query block: under a causal mask at
/// its first one, otherwise at its share of a ring. So no two of them add to the same dQ at a time,
/// and in deterministic mode, which fixes the order in which they do, none waits for long.
template <class Traits, class Params>
class QuerySteps {
 public:
  CUTLASS_DEVICE QuerySteps(Params const& params, KeyBlockCoord const& coord)
      : params_(params), coord_(coord) {
    QueryRange const range =
        params.mask.query_blocks(coord.n_block * Traits::kTileN, Traits::kTileN, Traits::kTileM);
    int const m_blocks = params.workspace.m_blocks;
    first_ = range.first;
    full_ = range.full;
    start_ = params.mask.causal ? first_ : coord.n_block % params.ring * m_blocks / ring_size();
    block_ = start_;
    head_in_group_ = 0;
  }

  CUTLASS_DEVICE bool valid() const { return head_in_group_ < params_.heads_per_kv; }

  CUTLASS_DEVICE void advance() {
    if (++block_ == params_.workspace.m_blocks) block_ = first_;
    if (block_ == start_) ++head_in_group_;
  }

  CUTLASS_DEVICE int head() const { return coord_.kv_head * params_.heads_per_kv + head_in_group_; }
  CUTLASS_DEVICE int block() const { return block_; }
  CUTLASS_DEVICE bool masked() const { return block_ < full_; }

  /// Counts over all query blocks of a call.
  CUTLASS_DEVICE int64_t block_index() const {
    return (static_cast<int64_t>(coord_.batch) * params_.heads + head()) *
               params_.workspace.m_blocks +
           block_;
  }

  /// How many key blocks add to this step's dQ before, in deterministic mode: those that come to it
  /// sooner when all start together.
  CUTLASS_DEVICE int turn() const {
    if (params_.mask.causal) {
      int const seen =
          params_.mask.key_blocks(block_ * Traits::kTileM, Traits::kTileM, Traits::kTileN).visited;
      return seen - 1 - coord_.n_block;
    }
    int const size = ring_size();
    int const in_ring = coord_.n_block % params_.ring;
    int const m_blocks = params_.workspace.m_blocks;
    int const started = ((block_ + 1) * size + m_blocks - 1) / m_blocks;  // here or before
    int const place = started - 1 - in_ring;
    return coord_.n_block - in_ring + (place < 0 ? place + size : place);
  }

 private:
  /// Key blocks are taken in rings of at most as many as run at a time.
  CUTLASS_DEVICE int ring_size() const {
    int const ring_start = coord_.n_block / params_.ring * params_.ring;
    return min(params_.ring, params_.n_blocks.divisor - ring_start);
  }

  Params const& params_;
  KeyBlockCoord const coord_;
  int first_;  // of the blocks that see the keys
  int full_;   // the first that needs no mask
  int start_;
  int block_;
  int head_in_group_;
};

}  // namespace cute_kernels::attention
