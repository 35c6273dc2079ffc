#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/decode/work.hpp"

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
  constexpr int kVector = sizeof(uint4) / sizeof(Element);
  int const vectors = call.heads_q * call.head_dim_v / kVector;
  for (int i = cta; i < unused; i += ctas) {
    int64_t const row = i < first ? i : i + (end - first);
    auto* const out_row = static_cast<uint4*>(out) + row * vectors;
    for (int j = threadIdx.x; j < vectors; j += threads) out_row[j] = uint4{};
    for (int head = threadIdx.x; head < call.heads_q; head += threads) {
      lse[int64_t{head} * call.total_q + row] = -INFINITY;
    }
  }
}

}  // namespace cute_kernels::attention
