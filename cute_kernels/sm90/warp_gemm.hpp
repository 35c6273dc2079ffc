#pragma once

#include <type_traits>

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

namespace cute_kernels::sm90 {

/// C = A B^T of one warp by mma.sync, for the rare case that one warp needs its share of a WGMMA
/// again. a (16, k) and b (n, k) lie in shared memory; c receives (16, n) in the order of registers
/// that the warp has in a WGMMA's accumulator. Small rather than fast.
template <class TensorA, class TensorB, class FragmentC>
CUTLASS_DEVICE void warp_gemm(TensorA const& a, TensorB const& b, FragmentC& c) {
  using namespace cute;
  using Element = typename TensorA::value_type;
  using Atom = std::conditional_t<std::is_same_v<Element, cutlass::half_t>,
                                  SM80_16x8x16_F32F16F16F32_TN, SM80_16x8x16_F32BF16BF16F32_TN>;
  auto mma = make_tiled_mma(Atom{});
  auto slice = mma.get_thread_slice(threadIdx.x % cutlass::NumThreadsPerWarp);
  auto from_a = slice.partition_A(a);
  auto from_b = slice.partition_B(b);
  auto accumulator = make_tensor(
      c.data(), make_layout(Shape<Shape<_2, _2>, _1, Int<decltype(size<1>(from_b))::value>>{}));
  clear(accumulator);
  auto part_a = make_fragment_like<Element>(from_a(_, _, 0));
  auto part_b = make_fragment_like<Element>(from_b(_, 0, 0));
  CUTLASS_PRAGMA_UNROLL
  for (int n = 0; n < size<1>(from_b); ++n) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (int k = 0; k < size<2>(from_a); ++k) {
      copy(from_a(_, _, k), part_a);
      copy(from_b(_, n, k), part_b);
      gemm(mma, part_a(_, 0), part_b, accumulator(_, 0, n));
    }
  }
}

}  // namespace cute_kernels::sm90
