#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/attention/schedule/prepare.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"

// The kernel that runs before one that attends to a cache.
namespace cute_kernels::attention {

inline constexpr int kDealThreads = 512;

struct DealShared {
  static constexpr int kWarps = kDealThreads / 32;
  int64_t warp_blocks[kWarps];
  int warp_longest[kWarps];
  int64_t starts[kDealThreads + 1];
};

/// Deals the line of blocks to `ctas` CTAs. The work of one CTA of kDealThreads.
template <class Tiling>
CUTLASS_DEVICE void deal_work(CachedCall const& call, int ctas, int num_splits,
                              DecodeWork const& work, DealShared& shared) {
  int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  // Each thread has sequences that follow one another.
  int const own = (call.batch + kDealThreads - 1) / kDealThreads;
  int const first = lesser(thread * own, call.batch);
  int const end = lesser(first + own, call.batch);
  int64_t blocks = 0;
  int longest = 0;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int entry = first; entry < end; ++entry) {
    SequenceBlocks const of_sequence = blocks_of<Tiling>(call, entry);
    blocks += of_sequence.count;
    longest = greater(longest, of_sequence.longest);
  }
  int64_t sum = blocks;  // up to this lane
  CUTLASS_PRAGMA_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    int64_t const before = __shfl_up_sync(0xffffffff, sum, lanes);
    if (lane >= lanes) sum += before;
    longest = greater(longest, __shfl_xor_sync(0xffffffff, longest, lanes));
  }
  if (lane == 31) {
    shared.warp_blocks[warp] = sum;
    shared.warp_longest[warp] = longest;
  }
  __syncthreads();
  int64_t start = sum - blocks, all = 0;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < DealShared::kWarps; ++i) {
    start += i < warp ? shared.warp_blocks[i] : 0;
    all += shared.warp_blocks[i];
    longest = greater(longest, shared.warp_longest[i]);
  }
  // In shared memory where there is room: each CTA's place is searched there.
  int64_t* const starts = call.batch <= kDealThreads ? shared.starts : work.starts;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int entry = first; entry < end; ++entry) {
    starts[entry] = start;
    if (entry + 1 < end) start += blocks_of<Tiling>(call, entry).count;
  }
  if (thread == 0) starts[call.batch] = all;
  __syncthreads();
  WorkLine const line(all, longest, ctas, num_splits);
  if (thread == 0) *work.line = line;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int cta = thread; cta < ctas; cta += kDealThreads) {
    work.places[cta] = place_of<Tiling>(call, line, starts, cta);
    work.arrivals[cta] = 0;
  }
}

/// The first CTA deals the work, the others clear rows that no sequence uses.
template <class Tiling>
__global__ void __launch_bounds__(kDealThreads)
    deal_kernel(CachedCall const call, int const ctas, int const num_splits, DecodeWork const work,
                UnusedRows const unused) {
  sm90::let_next_kernel_start();
  if (blockIdx.x == 0) {
    __shared__ DealShared shared;
    deal_work<Tiling>(call, ctas, num_splits, work, shared);
  } else {
    clear_unused_rows(unused, call.lengths.cu_seqlens_q, nullptr, call.total_q, call.batch);
  }
}

}  // namespace cute_kernels::attention
