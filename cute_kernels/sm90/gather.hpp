#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/util.hpp>

// Copies to shared memory by the threads themselves (cp.async), 16 bytes each, for rows that lie
// anywhere.
namespace cute_kernels::sm90 {

/// a * b + c. The compiler does not look inside: it would take a sum c apart and add it up each
/// time.
CUTLASS_DEVICE uint64_t multiply_add(uint32_t a, uint32_t b, uint64_t c) {
  uint64_t sum;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(c));
  return sum;
}

/// Copies 16 bytes to shared memory, asynchronously; 0 where `there` is false: then nothing is
/// read. Both addresses are multiples of 16.
CUTLASS_DEVICE void gather_or_clear(uint32_t shared, void const* global, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}

/// The same of one number, if `condition`. Not behind a branch, of which each costs more than the
/// copy.
CUTLASS_DEVICE void gather_or_clear_float_if(bool condition, float* shared, float const* global,
                                             bool there) {
  asm volatile(
      "{\n"
      ".reg .pred condition;\n"
      "setp.ne.b32 condition, %0, 0;\n"
      "@condition cp.async.ca.shared.global [%1], [%2], 4, %3;\n"
      "}" ::"r"(static_cast<int>(condition)),
      "r"(cute::cast_smem_ptr_to_uint(shared)), "l"(global), "r"(there ? 4 : 0)
      : "memory");
}

CUTLASS_DEVICE void gather_or_clear_float(float* shared, float const* global, bool there) {
  gather_or_clear_float_if(true, shared, global, there);
}

/// One of the barrier's arrivals, when all that the thread has gathered so far has landed. Whoever
/// waits for it lets WGMMA read only behind cutlass::arch::fence_view_async_shared().
CUTLASS_DEVICE void arrive_when_gathered(cutlass::arch::ClusterBarrier const& barrier) {
  cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t const*>(&barrier));
}

/// Waits until all that the thread has gathered has landed.
CUTLASS_DEVICE void wait_until_gathered() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// The same, but for what it has gathered since the last kGroups times that it has put a fence
/// (cute::cp_async_fence()) behind it.
template <int kGroups>
CUTLASS_DEVICE void wait_until_gathered_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace cute_kernels::sm90
