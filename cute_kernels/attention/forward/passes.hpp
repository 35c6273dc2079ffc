#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

namespace cute_kernels::attention {

/// A CTA's passes over its tiles: one, or where the first has found something that is not finite,
/// a second one, guarded (ValueGuard). Barriers and pipelines go on as if it were more tiles.
struct ForwardPasses {
  bool wanted;          // a second pass; set by anyone
  bool guarded;         // this is the second one
  uint32_t first_tile;  // how many tiles came before, modulo 2
  int first_v_stage;    // V's stage that is loaded first
  // The loader's, for the pass to come.
  uint32_t next_first_tile;
  int next_first_v_stage;

  /// Whether there is another pass. Of all threads of the CTA, when they are done with this one.
  CUTLASS_DEVICE bool go_on() {
    sync();
    bool const again = wanted && !guarded;
    sync();
    if (!again) return false;
    if (threadIdx.x == 0) {
      guarded = true;
      first_tile = next_first_tile;
      first_v_stage = next_first_v_stage;
    }
    sync();
    return true;
  }

 private:
  /// __syncthreads() of warps that are at different places of the kernel.
  CUTLASS_DEVICE static void sync() { asm volatile("bar.sync 0;" ::: "memory"); }
};

}  // namespace cute_kernels::attention
