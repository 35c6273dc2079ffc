#pragma once

#include <cutlass/arch/barrier.h>

namespace cute_kernels::sm90 {

/// Every named barrier of the attention kernels (hardware has 16; CUTLASS reserves 8 of them), with
/// who meets there. A value names the first of a run: the barrier of consumer warpgroup i is
/// value + i.
enum class NamedBarrier : int {
  /// Pingpong. Warpgroup i waits here before it issues WGMMAs; the warpgroup before it in the ring
  /// arrives once its own are issued. 256 threads.
  kTurn = 0,
  /// Epilogue. The 128 threads of warpgroup i meet here when their part of O stands in shared
  /// memory, before one of them starts the TMA store.
  kOutputReady = 4,
  /// Backward's epilogue. All consumer threads meet here before dK and dV overwrite K and V, and
  /// again before one of them starts the TMA store.
  kGradientsReady = 0,
  /// Backward, split by products. The 128 threads of warpgroup i meet here when they have read what
  /// they are about to overwrite: P by dS, or a stage by dQ.
  kStageRead = 1,
  /// Backward. All consumer threads meet here around the clearing of a step's Q and dO.
  kQueriesCleared = 3,
};

CUTLASS_DEVICE void barrier_arrive(NamedBarrier barrier, int warpgroup, int threads) {
  cutlass::arch::NamedBarrier::arrive(threads, static_cast<uint32_t>(barrier) + warpgroup);
}

CUTLASS_DEVICE void barrier_sync(NamedBarrier barrier, int warpgroup, int threads) {
  cutlass::arch::NamedBarrier::sync(threads, static_cast<uint32_t>(barrier) + warpgroup);
}

}  // namespace cute_kernels::sm90
