#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/decode/work.hpp"

namespace cute_kernels::attention {

/// How the threads of a CTA find its share of the line: all CTAs add up the same lengths.
template <class Traits>
class WorkDealer {
  static constexpr int kLanes = 32;
  static constexpr int kWarps = Traits::kThreads / kLanes;

 public:
  struct Shared {
    int64_t blocks[kWarps];
    int longest[kWarps];
    WorkLine line;
    WorkPlace place;
  };

  /// By all threads, which then know the line and the CTA's place.
  CUTLASS_DEVICE static void deal(CachedCall const& call, int num_splits, Shared& shared) {
    int const lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    // Each thread has sequences that follow one another.
    int const own = (call.batch + Traits::kThreads - 1) / Traits::kThreads;
    int const first = lesser(threadIdx.x * own, call.batch);
    int const end = lesser(first + own, call.batch);
    int64_t blocks = 0;
    int longest = 0;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int entry = first; entry < end; ++entry) {
      SequenceBlocks const of_sequence = blocks_of<Traits>(call, entry);
      blocks += of_sequence.count;
      longest = greater(longest, of_sequence.longest);
    }
    int64_t start = blocks;  // the sum up to this lane
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      int64_t const before = __shfl_up_sync(0xffffffff, start, lanes);
      if (lane >= lanes) start += before;
      longest = greater(longest, __shfl_xor_sync(0xffffffff, longest, lanes));
    }
    if (lane == kLanes - 1) {
      shared.blocks[warp] = start;
      shared.longest[warp] = longest;
    }
    start -= blocks;
    __syncthreads();
    int64_t all = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kWarps; ++i) {
      start += i < warp ? shared.blocks[i] : 0;
      all += shared.blocks[i];
      longest = greater(longest, shared.longest[i]);
    }
    int const cta = blockIdx.x;
    WorkLine const line(all, longest, gridDim.x, num_splits);
    int64_t const block = line.begin(cta);
    if (block >= start && block < start + blocks) {
      int entry = first;
      int64_t of_entry = first + 1 == end ? blocks : 0;
      CUTLASS_PRAGMA_NO_UNROLL
      while (first + 1 < end) {
        of_entry = blocks_of<Traits>(call, entry).count;
        if (block < start + of_entry) break;
        start += of_entry;
        ++entry;
      }
      shared.place = place_in_sequence<Traits>(call, entry, start, of_entry, block);
    }
    if (threadIdx.x == 0) {
      shared.line = line;
      if (block >= all) shared.place = end_of_line(line);
    }
    __syncthreads();
  }
};

}  // namespace cute_kernels::attention
