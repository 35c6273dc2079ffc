#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/util.hpp>

namespace cute_kernels::sm90 {

/// Writes `value` to the same place in shared memory of a CTA of the cluster.
CUTLASS_DEVICE void store_to_cta(int* data, int value, uint32_t cta) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(cute::cast_smem_ptr_to_uint(data)), "r"(cta));
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(remote), "r"(value) : "memory");
}

/// Copies `bytes` of shared memory to the same place in another CTA of the cluster, asynchronously,
/// and tells that CTA's `barrier` how many have landed. Addresses and bytes are multiples of 16.
CUTLASS_DEVICE void copy_to_cta(void const* data,
                                cutlass::arch::ClusterTransactionBarrier const& barrier, int bytes,
                                uint32_t cta) {
  auto in_cta = [cta](void const* local) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(remote)
                 : "r"(cute::cast_smem_ptr_to_uint(local)), "r"(cta));
    return remote;
  };
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(in_cta(data)),
      "r"(cute::cast_smem_ptr_to_uint(data)), "r"(bytes), "r"(in_cta(&barrier))
      : "memory");
}

}  // namespace cute_kernels::sm90
