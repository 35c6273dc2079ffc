#pragma once

#include <cutlass/cutlass.h>

// Programmatic dependent launch: a kernel that is launched with
// cudaLaunchAttributeProgrammaticStreamSerialization may start before the one before it has ended.
namespace cute_kernels::sm90 {

/// The next kernel may start when every CTA of this one has come here, or ended.
CUTLASS_DEVICE void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/// Waits until the kernel before is complete, and sees what it has written.
CUTLASS_DEVICE void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace cute_kernels::sm90
