#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include "cute_kernels/sm90/bulk_reduce.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// dQ of a step: a warpgroup's slice of the product dS K, and how it is handed out.
template <class Traits>
class BackwardDq {
  using SharedStorage = typename Traits::SharedStorage;
  using DqSplit = typename Traits::DqSplit;

 public:
  /// A and B of a slice's product with some keys; the one that is dS has a mode of buffers.
  template <class Keys, class LayoutKt>
  CUTLASS_DEVICE static auto operands(SharedStorage& shared, Keys& keys, LayoutKt layout_kt,
                                      int slice_of_keys, int thread) {
    using namespace cute;
    auto ds = make_tensor(make_smem_ptr(shared.ds.data()), typename Traits::LayoutDs{});
    auto kt = make_tensor(make_smem_ptr(keys.data()), layout_kt);
    auto own_kt = local_tile(kt, Shape<Int<Traits::kDqChannels>, Int<Traits::kTileN>>{},
                             make_coord(kByQueries ? 0 : slice_of_keys, _0{}));
    auto own_ds = local_tile(ds, Shape<Int<Traits::kDqQueries>, Int<Traits::kTileN>>{},
                             make_coord(kByQueries ? slice_of_keys : 0, _0{}));
    auto slice = typename Traits::MmaDq{}.get_thread_slice(thread);
    if constexpr (Traits::kDqTransposed) {
      return cute::make_tuple(slice.make_fragment_A(slice.partition_A(own_kt)),
                              slice.make_fragment_B(slice.partition_B(own_ds)));
    } else {
      return cute::make_tuple(slice.make_fragment_A(slice.partition_A(own_ds)),
                              slice.make_fragment_B(slice.partition_B(own_kt)));
    }
  }

  CUTLASS_DEVICE static auto accumulator() {
    return cute::partition_fragment_C(
        typename Traits::MmaDq{},
        cute::Shape<cute::Int<Traits::kSliceM>, cute::Int<Traits::kSliceN>>{});
  }

  template <sm90::Accumulate kAccumulate, class Operands, class Accumulator>
  CUTLASS_DEVICE static void issue(Operands const& operands, int buffer, Accumulator& dq) {
    using namespace cute;
    typename Traits::MmaDq mma;
    if constexpr (Traits::kDqTransposed) {
      sm90::issue_gemm<kAccumulate>(mma, get<0>(operands), get<1>(operands)(_, _, _, buffer), dq);
    } else {
      sm90::issue_gemm<kAccumulate>(mma, get<0>(operands)(_, _, _, buffer), get<1>(operands), dq);
    }
  }

  /// Registers to shared memory, for BackwardSender to take from there once it is announced.
  template <class Accumulator>
  CUTLASS_DEVICE static void write(SharedStorage& shared, int warpgroup, int index, int thread,
                                   Accumulator const& dq) {
    auto* target = reinterpret_cast<float4*>(buffer(shared, warpgroup, index)) + thread;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(dq) / 4; ++i) {
      target[i * cutlass::NumThreadsPerWarpGroup] =
          make_float4(dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
    }
  }

  /// Lets BackwardSender take what has been written. Waits until it stands in memory, so do other
  /// things in between.
  CUTLASS_DEVICE static void announce(SharedStorage& shared, int warpgroup, int index, int thread) {
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (thread % cutlass::NumThreadsPerWarp == 0) shared.dq_full[warpgroup][index].arrive();
  }

  /// Registers to global memory, in no particular order.
  template <class Params, class Accumulator>
  CUTLASS_DEVICE static void add_now(Params const& params, int64_t slice, int thread,
                                     Accumulator const& dq) {
    float* target = params.workspace.dq + slice * Traits::kSliceFloats + 4 * thread;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(dq) / 4; ++i) {
      sm90::reduce_add(target + 4 * cutlass::NumThreadsPerWarpGroup * i, dq(4 * i), dq(4 * i + 1),
                       dq(4 * i + 2), dq(4 * i + 3));
    }
  }

  /// Where a warpgroup's slices stand in shared memory.
  CUTLASS_DEVICE static float* buffer(SharedStorage& shared, int warpgroup, int index) {
    if constexpr (Traits::kSplitProducts) {
      return reinterpret_cast<float*>(
          warpgroup == 0 ? shared.grad_out.data() + index * Traits::kTileM * Traits::kHeadDimV
                         : shared.q.data() + index * Traits::kTileM * Traits::kHeadDim);
    } else {
      return shared.own.dq[warpgroup];
    }
  }

 private:
  static constexpr bool kByQueries = Traits::kDqSplit == DqSplit::kQueries;
};

}  // namespace cute_kernels::attention
