#pragma once

#include <cutlass/cutlass.h>

namespace cute_kernels::sm90 {

/// What all threads of a warp have, which only now the compiler knows: what follows from it, and
/// whatever changes in a loop that it ends, may then stand in uniform registers, where WGMMA wants
/// its descriptors. Of a whole warp.
CUTLASS_DEVICE int uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

}  // namespace cute_kernels::sm90
