#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// Writes dK and dV of the CTA's keys through the memory of K and V by TMA, which clips rows and
/// columns outside the tensors.
template <class Traits>
class BackwardEpilogue {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;

 public:
  /// Of a warpgroup with both gradients of its own 64 keys.
  template <class Params, class Accumulator>
  CUTLASS_DEVICE static void store(Params const& params, SharedStorage& shared,
                                   KeyBlockCoord const& coord, int warpgroup, Accumulator& dk,
                                   Accumulator& dv) {
    wait_for_all();  // done with K and V
    scale(dk, params.softmax_scale);
    write(shared.v, warpgroup, dv);
    write(shared.k, warpgroup, dk);
    cute::tma_store_fence();
    wait_for_all();
    if (warpgroup == 0 && leads_warpgroup()) {
      store_tile(params.tma_dv, params.shape_k, shared.v, coord);
      store_tile(params.tma_dk, params.shape_k, shared.k, coord);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }

  /// Of a warpgroup with one gradient of the CTA's 64 keys, to leave through `buffer`.
  template <class Params, class Tma, class Buffer, class Accumulator>
  CUTLASS_DEVICE static void store_one(Params const& params, Tma const& tma, Buffer& buffer,
                                       KeyBlockCoord const& coord, Accumulator& gradient,
                                       float factor) {
    wait_for_all();  // done with K and V
    scale(gradient, factor);
    write(buffer, 0, gradient);
    cute::tma_store_fence();
    wait_for_all();
    if (leads_warpgroup()) {
      store_tile(tma, params.shape_k, buffer, coord);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }

 private:
  CUTLASS_DEVICE static bool leads_warpgroup() {
    return threadIdx.x % cutlass::NumThreadsPerWarpGroup == 0;
  }

  CUTLASS_DEVICE static void wait_for_all() {
    sm90::barrier_sync(sm90::NamedBarrier::kGradientsReady, 0,
                       Traits::kConsumers * cutlass::NumThreadsPerWarpGroup);
  }

  template <class Accumulator>
  CUTLASS_DEVICE static void scale(Accumulator& gradient, float factor) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(gradient); ++i) gradient(i) *= factor;
  }

  template <class Buffer, class Accumulator>
  CUTLASS_DEVICE static void write(Buffer& buffer, int warpgroup, Accumulator const& gradient) {
    using namespace cute;
    auto rounded = make_tensor<Element>(gradient.layout());
    sm90::convert_fragment<Element>(gradient, rounded);
    auto tile = local_tile(make_tensor(make_smem_ptr(buffer.data()), typename Traits::LayoutK{}),
                           Shape<Int<Traits::kWarpgroupN>, Int<Traits::kHeadDim>>{},
                           make_coord(warpgroup, _0{}));
    auto tiled_copy =
        make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, typename Traits::MmaDkv{});
    auto slice = tiled_copy.get_thread_slice(threadIdx.x % cutlass::NumThreadsPerWarpGroup);
    copy(tiled_copy, slice.retile_S(rounded), slice.partition_D(tile));
  }

  template <class Tma, class Shape_, class Buffer>
  CUTLASS_DEVICE static void store_tile(Tma const& tma, Shape_ const& shape, Buffer& buffer,
                                        KeyBlockCoord const& coord) {
    using namespace cute;
    auto keys = local_tile(tma.get_tma_tensor(shape)(_, _, coord.kv_head, coord.batch),
                           Shape<Int<Traits::kTileN>, Int<Traits::kHeadDim>>{},
                           make_coord(coord.n_block, _0{}));
    auto tile = make_tensor(make_smem_ptr(buffer.data()), typename Traits::LayoutK{});
    auto slice = tma.get_slice(_0{});
    copy(tma, slice.partition_S(tile), slice.partition_D(keys));
  }
};

}  // namespace cute_kernels::attention
