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

/// Calls step(block_index, block, head, masked) for every query block of every query head of a CTA,
/// in the one order that all its warps keep. block_index counts over the whole call.
template <class Traits, class Params, class Step>
CUTLASS_DEVICE void for_each_step(Params const& params, KeyBlockCoord const& coord, Step step) {
  QueryRange const range =
      params.mask.query_blocks(coord.n_block * Traits::kTileN, Traits::kTileN, Traits::kTileM);
  int const first_head = coord.kv_head * params.heads_per_kv;
  for (int head = first_head; head < first_head + params.heads_per_kv; ++head) {
    int64_t const base =
        (static_cast<int64_t>(coord.batch) * params.heads + head) * params.workspace.m_blocks;
    for (int block = range.first; block < params.workspace.m_blocks; ++block) {
      step(base + block, block, head, block < range.full);
    }
  }
}

}  // namespace cute_kernels::attention
