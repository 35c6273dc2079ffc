#pragma once

#include <cutlass/cutlass.h>
#include <cute/arch/util.hpp>

namespace cute_kernels::sm90 {

/// Adds `bytes` of floats in shared memory to global memory, asynchronously, as part of the
/// thread's bulk group (cute::tma_store_arrive commits it). Both addresses are multiples of 16.
CUTLASS_DEVICE void bulk_reduce_add(float* global, float const* shared, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(cute::cast_smem_ptr_to_uint(shared)), "r"(bytes)
      : "memory");
}

/// Writes them instead, likewise.
CUTLASS_DEVICE void bulk_store(float* global, float const* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(cute::cast_smem_ptr_to_uint(shared)), "r"(bytes)
               : "memory");
}

/// Adds four floats of a thread to 16 aligned bytes of global memory.
CUTLASS_DEVICE void reduce_add(float* global, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(a),
               "f"(b), "f"(c), "f"(d)
               : "memory");
}

/// Waits until the thread's committed bulk groups are complete in global memory, not only read.
CUTLASS_DEVICE void bulk_wait_complete() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace cute_kernels::sm90
