#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

namespace cute_kernels::attention {

/// A CTA's passes over its tiles: one, or where the first has found something that is not finite,
/// a second one, guarded. Barriers and pipelines go on as if it were more tiles.
struct CtaPasses {
  bool wanted;   // a second pass; set by anyone
  bool guarded;  // this is the second one

  /// Whether there is another pass. Of all threads of the CTA, when they are done with this one.
  CUTLASS_DEVICE bool go_on() {
    return go_on([] {});
  }

  /// One of them calls prepare() before the others go on.
  template <class Prepare>
  CUTLASS_DEVICE bool go_on(Prepare const& prepare) {
    sync();
    bool const again = wanted && !guarded;
    sync();
    if (!again) return false;
    if (threadIdx.x == 0) {
      guarded = true;
      prepare();
    }
    sync();
    return true;
  }

 private:
  /// __syncthreads() of warps that are at different places of the kernel.
  CUTLASS_DEVICE static void sync() { asm volatile("bar.sync 0;" ::: "memory"); }
};

/// With ValueGuard, which is told where in the pipelines a pass begins.
struct ForwardPasses : CtaPasses {
  uint32_t first_tile;  // how many tiles came before, modulo 2
  int first_v_stage;    // V's stage that is loaded first
  // The loader's, for the pass to come.
  uint32_t next_first_tile;
  int next_first_v_stage;

  CUTLASS_DEVICE bool go_on() {
    return CtaPasses::go_on([&] {
      first_tile = next_first_tile;
      first_v_stage = next_first_v_stage;
    });
  }
};

}  // namespace cute_kernels::attention
