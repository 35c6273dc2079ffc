#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

namespace cute_kernels::attention {

/// A place in the ring of stages.
template <int kStages>
struct RingStage {
  int index = 0;
  uint32_t phase = 0;

  /// The place of block `number`, of all that a CTA comes to.
  CUTLASS_DEVICE static RingStage of(uint32_t number) {
    return {static_cast<int>(number % kStages), number / kStages & 1};
  }

  /// By kStages blocks at most.
  CUTLASS_DEVICE void advance(int blocks = 1) {
    index += blocks;
    if (index >= kStages) {
      index -= kStages;
      phase ^= 1;
    }
  }
};

}  // namespace cute_kernels::attention
