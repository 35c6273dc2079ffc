#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

namespace cute_kernels::attention {

/// A place in the ring of stages.
template <int kStages>
struct RingStage {
  int index = 0;
  uint32_t phase = 0;

  CUTLASS_DEVICE void advance() {
    if (++index == kStages) {
      index = 0;
      phase ^= 1;
    }
  }
};

}  // namespace cute_kernels::attention
