#pragma once

#include "cute_kernels/attention/decode/epilogue.hpp"

namespace cute_kernels::attention {

/// Rows of Q that no sequence has, before the first one and behind the last: their output is 0,
/// their LSE -inf. The work of the producer warpgroups of all CTAs.
template <class Element>
CUTLASS_DEVICE void clear_unused_rows(CachedCall const& call, DecodeResults const& results) {
  int const* const starts = call.lengths.cu_seqlens_q;
  int const first = lesser(greater(0, starts[0]), call.total_q);
  int const end = lesser(greater(first, starts[call.batch]), call.total_q);
  int const unused = call.total_q - (end - first);
  constexpr int kVector = sizeof(uint4) / sizeof(Element);
  int const vectors = call.heads_q * call.head_dim_v / kVector;
  for (int i = blockIdx.x; i < unused; i += gridDim.x) {
    int64_t const row = i < first ? i : i + (end - first);
    auto* const out = static_cast<uint4*>(results.out) + row * vectors;
    for (int j = threadIdx.x; j < vectors; j += cutlass::NumThreadsPerWarpGroup) out[j] = uint4{};
    for (int head = threadIdx.x; head < call.heads_q; head += cutlass::NumThreadsPerWarpGroup) {
      results.lse[int64_t{head} * call.total_q + row] = -INFINITY;
    }
  }
}

}  // namespace cute_kernels::attention
