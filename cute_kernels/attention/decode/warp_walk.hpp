#pragma once

#include <new>

#include "cute_kernels/attention/decode/work.hpp"

namespace cute_kernels::attention {

/// A warp's walk over the parts of its CTA, in shared memory, where one lane walks: what only few
/// blocks look at takes no registers from the others then.
template <class Traits>
class WarpWalk {
  using Walk = WorkWalk<Traits>;

 public:
  struct alignas(8) Memory {
    char bytes[sizeof(Walk)];
  };

  /// `first_part` makes the walk, which takes the place of `memory`.
  template <class FirstPart, class AnyMemory>
  CUTLASS_DEVICE WarpWalk(FirstPart const& first_part, AnyMemory& memory)
      : walk_(reinterpret_cast<Walk&>(memory)) {
    static_assert(sizeof(AnyMemory) == sizeof(Walk));
    if (is_walker()) new (&walk_) Walk(first_part());
    __syncwarp();
  }

  CUTLASS_DEVICE bool valid() const { return walk_.valid(); }
  CUTLASS_DEVICE void advance() {
    __syncwarp();
    if (is_walker()) walk_.advance();
    __syncwarp();
  }
  CUTLASS_DEVICE operator Walk const&() const { return walk_; }

 private:
  CUTLASS_DEVICE static bool is_walker() { return threadIdx.x % cutlass::NumThreadsPerWarp == 0; }

  Walk& walk_;
};

}  // namespace cute_kernels::attention
