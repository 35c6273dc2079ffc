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
    int blocks[kWarps];
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
    // Mostly one, whose lengths are read at a time.
    SequenceWork work =
        first < end ? work_of<Traits>(call, first) : SequenceWork{kNoSequence, 0, 0};
    int blocks = work.blocks;
    int longest = work.longest;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int entry = first + 1; entry < end; ++entry) {
      SequenceWork const next = work_of<Traits>(call, entry);
      blocks += next.blocks;
      longest = greater(longest, next.longest);
    }
    int start = blocks;  // the sum up to this lane
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      int const before = __shfl_up_sync(0xffffffff, start, lanes);
      if (lane >= lanes) start += before;
      longest = greater(longest, __shfl_xor_sync(0xffffffff, longest, lanes));
    }
    if (lane == kLanes - 1) {
      shared.blocks[warp] = start;
      shared.longest[warp] = longest;
    }
    start -= blocks;
    __syncthreads();
    int all = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kWarps; ++i) {
      start += i < warp ? shared.blocks[i] : 0;
      all += shared.blocks[i];
      longest = greater(longest, shared.longest[i]);
    }
    int const cta = blockIdx.x;
    WorkLine const line(all, call.heads_kv, longest, gridDim.x, num_splits);
    int const block = line.begin(cta);
    int const head = all == 0 ? 0 : block / all;
    start += head * all;
    if (block < line.blocks && block >= start && block < start + blocks) {
      int entry = first;
      CUTLASS_PRAGMA_NO_UNROLL
      while (block >= start + work.blocks) {
        start += work.blocks;
        work = work_of<Traits>(call, ++entry);
      }
      shared.place = place_in_sequence<Traits>(work.sequence, entry, head, start, block);
    }
    if (threadIdx.x == 0) {
      shared.line = line;
      if (block >= line.blocks) shared.place = end_of_line(line);
    }
    __syncthreads();
  }
};

}  // namespace cute_kernels::attention
