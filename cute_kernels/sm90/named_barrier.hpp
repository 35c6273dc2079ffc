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
  /// memory, before one of them starts the TMA store; where O shares Q's memory, also in a tile of
  /// which they have no rows. In 8 bits also before sums of P V stand there.
  kOutputReady = 4,
  /// Backward's epilogue. All consumer threads meet here before dK and dV overwrite K and V, and
  /// again before one of them starts the TMA store.
  kGradientsReady = 0,
  /// Backward, split by products. The 128 threads of warpgroup i meet here when they have read what
  /// they are about to overwrite: P by dS, or a stage by dQ.
  kStageRead = 1,
  /// Backward. All consumer threads meet here around the clearing of a step's Q and dO.
  kQueriesCleared = 3,
  /// Attention to a cache. All consumer threads meet here around what one warp does for all: it
  /// tells that a part is there.
  kPartStored = 0,
  /// Attention to a cache. The 128 threads of warpgroup i meet here around the clearing of a block
  /// of V that no other one reads: where they take turns with blocks, or have a key head each.
  kValuesCleared = 1,
  /// Attention to a cache of 8 bits and many rows. The 128 threads of warpgroup i meet here around
  /// the writing of its queries.
  kQueriesWritten = 3,
  /// Attention to a cache. Consumers that have had a share of the keys each meet here when they
  /// have read what they are about to overwrite, and again when O stands in shared memory.
  kTurnsEnded = 5,
  /// Attention to a cache. All consumer threads meet here around the clearing of a block of V that
  /// all of them read. One warpgroup may be here while another one is still in the part before, at
  /// a barrier of its own.
  kSharedValuesCleared = 6,
  /// Latent attention. The 128 threads of warpgroup i meet here when they have read what they are
  /// about to overwrite: the rope columns of a block, by P.
  kRopesRead = 3,
  /// Latent attention. All consumer threads meet here around the writing of their row sums.
  kSumsWritten = 5,
};

CUTLASS_DEVICE void barrier_arrive(NamedBarrier barrier, int warpgroup, int threads) {
  cutlass::arch::NamedBarrier::arrive(threads, static_cast<uint32_t>(barrier) + warpgroup);
}

CUTLASS_DEVICE void barrier_sync(NamedBarrier barrier, int warpgroup, int threads) {
  cutlass::arch::NamedBarrier::sync(threads, static_cast<uint32_t>(barrier) + warpgroup);
}

/// The same, where threads read what others have written to shared memory: the compiler, which may
/// do so with CUTLASS's barrier, moves no access to memory across.
CUTLASS_DEVICE void barrier_sync_memory(NamedBarrier barrier, int warpgroup, int threads) {
  asm volatile("" ::: "memory");
  barrier_sync(barrier, warpgroup, threads);
  asm volatile("" ::: "memory");
}

/// The same of all warps together: whether `condition` holds in every thread.
CUTLASS_DEVICE bool barrier_all(NamedBarrier barrier, int warpgroup, int threads, bool condition) {
  int all;
  asm volatile(
      "{\n"
      ".reg .pred own, all;\n"
      "setp.ne.b32 own, %1, 0;\n"
      "barrier.cta.red.and.pred all, %2, %3, own;\n"
      "selp.b32 %0, 1, 0, all;\n"
      "}"
      : "=r"(all)
      : "r"(static_cast<int>(condition)),
        "r"(static_cast<uint32_t>(barrier) + warpgroup +
            cutlass::arch::NamedBarrier::ReservedNamedBarrierCount),
        "r"(threads)
      : "memory");
  return all != 0;
}

}  // namespace cute_kernels::sm90
