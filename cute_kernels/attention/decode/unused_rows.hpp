#pragma once

#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/attention/unused_rows.hpp"

namespace cute_kernels::attention {

/// Rows of Q that no sequence has, before the first one and behind the last: their output is 0,
/// their LSE -inf. The work of `threads` threads each of `ctas` CTAs, of which this is number
/// `cta`.
template <class Element>
CUTLASS_DEVICE void clear_unused_rows(CachedCall const& call, void* out, float* lse, int cta,
                                      int ctas, int threads) {
  int const* const starts = call.lengths.cu_seqlens_q;
  int const first = lesser(greater(0, starts[0]), call.total_q);
  int const end = lesser(greater(first, starts[call.batch]), call.total_q);
  int const unused = call.total_q - (end - first);
  int64_t const row_bytes = int64_t{sizeof(Element)} * call.heads_q * call.head_dim_v;
  UnusedRows const rows{out, row_bytes, lse, call.heads_q, call.total_q};
  for (int i = cta; i < unused; i += ctas) {
    rows.clear(i < first ? i : i + (end - first), threadIdx.x, threads);
  }
}

}  // namespace cute_kernels::attention
