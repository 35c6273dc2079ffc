#pragma once

#include <type_traits>

#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

namespace cute_kernels::sm90 {

/// C = A B^T of one warp by mma.sync, for the rare case that one warp needs its share of a WGMMA
/// again. a (16, k) and b (n, k) lie in shared memory, n a multiple of 16; c receives (16, n) in
/// the order of registers that the warp has in a WGMMA's accumulator.
template <class TensorA, class TensorB, class FragmentC>
CUTLASS_DEVICE void warp_gemm(TensorA const& a, TensorB const& b, FragmentC& c) {
  using namespace cute;
  using Element = typename TensorA::value_type;
  using Atom = std::conditional_t<std::is_same_v<Element, cutlass::half_t>,
                                  SM80_16x8x16_F32F16F16F32_TN, SM80_16x8x16_F32BF16BF16F32_TN>;
  using Load = Copy_Atom<SM75_U32x4_LDSM_N, Element>;  // 16 rows and 16 columns
  TiledMMA<MMA_Atom<Atom>, Layout<Shape<_1, _1, _1>>, Tile<_16, _16, _16>> const mma;
  int const lane = threadIdx.x % cutlass::NumThreadsPerWarp;
  auto slice = mma.get_thread_slice(lane);
  auto load_a = make_tiled_copy_A(Load{}, mma).get_slice(lane);
  auto load_b = make_tiled_copy_B(Load{}, mma).get_slice(lane);
  auto from_a = load_a.partition_S(a);
  auto from_b = load_b.partition_S(b);
  auto part_a =
      slice.partition_fragment_A(local_tile(a, Shape<_16, _16>{}, make_coord(_0{}, _0{})));
  auto part_b =
      slice.partition_fragment_B(local_tile(b, Shape<_16, _16>{}, make_coord(_0{}, _0{})));
  auto to_a = load_a.retile_D(part_a);
  auto to_b = load_b.retile_D(part_b);
  constexpr int kColumns = decltype(size<1>(from_b))::value;
  auto accumulator = make_tensor(c.data(), make_layout(Shape<Shape<_2, _2>, _2, Int<kColumns>>{}));
  clear(accumulator);
  CUTLASS_PRAGMA_NO_UNROLL
  for (int k = 0; k < size<2>(from_a); ++k) {
    copy(Load{}, from_a(_, _0{}, k), to_a(_, _0{}, _0{}));
    CUTLASS_PRAGMA_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      copy(Load{}, from_b(_, n, k), to_b(_, _0{}, _0{}));
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        gemm(mma, part_a(_, _0{}, _0{}), part_b(_, half, _0{}), accumulator(_, half, n));
      }
    }
  }
}

}  // namespace cute_kernels::sm90
