#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>

namespace cute_kernels::attention {

/// dS of a step in shared memory, (query, key): each warpgroup writes what its accumulators hold of
/// dS^T, the product dS K reads all of it.
template <class Traits>
class BackwardDs {
  using Element = typename Traits::Element;

  static constexpr int kRowElements = 64;  // of the 128-byte swizzle, which repeats every 8 rows
  static constexpr int kQueriesAtOnce = 16;

 public:
  /// Where the thread begins to write. By the swizzle's period every further 16 queries are a
  /// constant away, so that a step computes no addresses.
  CUTLASS_DEVICE static Element* own_part(typename Traits::SharedStorage& shared, int warpgroup,
                                          int thread) {
    using namespace cute;
    int const lane = thread % cutlass::NumThreadsPerWarp;
    int const query = lane / 16 * 8 + lane % 8;
    int const key = warpgroup * Traits::kWarpgroupN + thread / cutlass::NumThreadsPerWarp * 16 +
                    lane / 8 % 2 * 8;
    auto ds = make_tensor(make_smem_ptr(shared.ds.data()), typename Traits::LayoutDs{});
    return raw_pointer_cast(&ds(query, key, 0));
  }

  /// Turns a fragment of dS^T and writes it to a buffer.
  template <class Fragment>
  CUTLASS_DEVICE static void store(Fragment const& ds, Element* own_part, int buffer) {
    auto words = cute::recast<uint32_t>(ds);
    Element* target = own_part + buffer * Traits::kTileM * Traits::kTileN;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kTileM / kQueriesAtOnce; ++i) {
      auto* rows = target + i * kQueriesAtOnce * kRowElements;
      cute::SM90_U16x8_STSM_T::copy(words(4 * i), words(4 * i + 1), words(4 * i + 2),
                                    words(4 * i + 3), *reinterpret_cast<cute::uint128_t*>(rows));
    }
  }
};

}  // namespace cute_kernels::attention
