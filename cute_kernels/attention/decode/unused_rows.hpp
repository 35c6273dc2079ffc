#pragma once

#include "cute_kernels/attention/decode/epilogue.hpp"
#include "cute_kernels/attention/unused_rows.hpp"

namespace cute_kernels::attention {

/// Rows of Q that no sequence has, before the first one and behind the last: their output is 0,
/// their LSE -inf. The work of the producer warpgroups of all CTAs.
template <class Element>
CUTLASS_DEVICE void clear_unused_rows(CachedCall const& call, DecodeResults const& results) {
  int const* const starts = call.lengths.cu_seqlens_q;
  int const first = lesser(greater(0, starts[0]), call.total_q);
  int const end = lesser(greater(first, starts[call.batch]), call.total_q);
  int const unused = call.total_q - (end - first);
  int64_t const row_bytes = int64_t{sizeof(Element)} * call.heads_q * call.head_dim_v;
  UnusedRows const rows{results.out, row_bytes, results.lse, call.heads_q, call.total_q};
  for (int i = blockIdx.x; i < unused; i += gridDim.x) {
    rows.clear(i < first ? i : i + (end - first), threadIdx.x, cutlass::NumThreadsPerWarpGroup);
  }
}

}  // namespace cute_kernels::attention
