#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/decode/work.hpp"

namespace cute_kernels::attention {

/// How the threads of a CTA find its share of the line: all CTAs add up the same lengths. Of few
/// sequences each warp does so for itself, a lane for each: no warp waits for another.
template <class Traits>
class WorkDealer {
  static constexpr int kLanes = 32;
  static constexpr int kWarps = Traits::kThreads / kLanes;

 public:
  /// What the threads then know.
  struct Share {
    WorkLine line;
    WorkPlace place;  // of the CTA
  };
  struct Shared {
    int blocks[kWarps];
    int longest[kWarps];
    Share of_warp[kWarps];  // or the first one's, of all
  };

  /// By all threads.
  CUTLASS_DEVICE static Share const& deal(CachedCall const& call, int num_splits, Shared& shared) {
    int const lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    bool const is_alone = call.batch <= kLanes;
    // Each thread has sequences that follow one another.
    int const own = is_alone ? 1 : (call.batch + Traits::kThreads - 1) / Traits::kThreads;
    int const first = lesser(is_alone ? lane : threadIdx.x * own, call.batch);
    int const end = lesser(first + own, call.batch);
    // Mostly one, whose lengths are read at a time.
    SequenceWork work =
        first < end ? work_of<Traits>(call, first) : SequenceWork{kNoSequence, 0, 0};
    int blocks = work.blocks;
    int longest = work.longest;
    if (own > 1) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int entry = first + 1; entry < end; ++entry) {
        SequenceWork const next = work_of<Traits>(call, entry);
        blocks += next.blocks;
        longest = greater(longest, next.longest);
      }
    }
    int start = blocks;  // the sum up to this lane
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      int const before = __shfl_up_sync(0xffffffff, start, lanes);
      if (lane >= lanes) start += before;
    }
    longest = static_cast<int>(__reduce_max_sync(0xffffffff, static_cast<unsigned>(longest)));
    int all = __shfl_sync(0xffffffff, start, kLanes - 1);
    if (!is_alone) {
      if (lane == 0) {
        shared.blocks[warp] = all;
        shared.longest[warp] = longest;
      }
      __syncthreads();
      all = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kWarps; ++i) {
        start += i < warp ? shared.blocks[i] : 0;
        all += shared.blocks[i];
        longest = greater(longest, shared.longest[i]);
      }
    }
    start -= blocks;
    WorkLine const line(all, call.heads_kv, longest, call.batch, gridDim.x, num_splits,
                        call.part_cost);
    int const block = line.begin(blockIdx.x);
    int const head = all == 0 ? 0 : quotient(block, all);
    start += head * all;
    Share& share = shared.of_warp[is_alone ? warp : 0];
    if (block < line.blocks && block >= start && block < start + blocks) {
      int entry = first;
      if (own > 1) {
        CUTLASS_PRAGMA_NO_UNROLL
        while (block >= start + work.blocks) {
          start += work.blocks;
          work = work_of<Traits>(call, ++entry);
        }
      }
      share.place = place_in_sequence<Traits>(work.sequence, entry, head, start, block);
    }
    if (is_alone ? lane == 0 : threadIdx.x == 0) {
      share.line = line;
      if (block >= line.blocks) share.place = end_of_line(line);
    }
    is_alone ? __syncwarp() : __syncthreads();
    return share;
  }
};

}  // namespace cute_kernels::attention
