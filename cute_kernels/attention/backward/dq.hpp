#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/sm90/bulk_reduce.hpp"
#include "cute_kernels/sm90/semaphore.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// dQ of a step: a warpgroup's slice of the product dS K, and its way to global memory.
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

  /// Registers to shared memory, for add() to take from there once it is announced.
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

  /// Lets add() take what write() has written. Waits until it stands in memory, so do other things
  /// in between.
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

  /// Adds the slices of one warpgroup to global memory and calls release() when TMA has read one.
  /// In deterministic mode the first to come to a slice writes it. Called by one thread.
  template <class Params, class Release>
  CUTLASS_DEVICE static void add(Params const& params, SharedStorage& shared,
                                 KeyBlockCoord const& coord, int warpgroup, Release release) {
    uint32_t phase = 0;
    int index = 0;
    for (QuerySteps<Traits, Params> step(params, coord); step.valid(); step.advance()) {
      if (params.deterministic) sm90::semaphore_wait(step.turns(), step.turn());
      shared.dq_full[warpgroup][index].wait(phase);
      float* const target = params.workspace.dq + step.dq_slice(warpgroup) * Traits::kSliceFloats;
      constexpr int kBytes = Traits::kSliceFloats * sizeof(float);
      if (params.deterministic && step.turn() == 0) {
        sm90::bulk_store(target, buffer(shared, warpgroup, index), kBytes);
      } else {
        sm90::bulk_reduce_add(target, buffer(shared, warpgroup, index), kBytes);
      }
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
      release();
      if (params.deterministic) {
        sm90::bulk_wait_complete();
        sm90::count_up(&shared.dq_added[warpgroup]);
      }
      if (++index == Traits::kDqBuffers) {
        index = 0;
        phase ^= 1;
      }
    }
    sm90::bulk_wait_complete();
  }

  /// Lets the next key block add to a query block when all slices are complete. Called by one
  /// thread, which spares those that add the wait for memory that this takes.
  template <class Params>
  CUTLASS_DEVICE static void pass_turns(Params const& params, SharedStorage& shared,
                                        KeyBlockCoord const& coord) {
    int done = 0;
    for (QuerySteps<Traits, Params> step(params, coord); step.valid(); step.advance()) {
      ++done;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Traits::kConsumers; ++i) {
        sm90::wait_for_count(&shared.dq_added[i], done);
      }
      sm90::semaphore_advance(step.turns());
    }
  }

 private:
  static constexpr bool kByQueries = Traits::kDqSplit == DqSplit::kQueries;

  CUTLASS_DEVICE static float* buffer(SharedStorage& shared, int warpgroup, int index) {
    if constexpr (Traits::kSplitProducts) {
      auto& stages = warpgroup == 0 ? shared.grad_out : shared.q;
      return reinterpret_cast<float*>(stages.data() + index * Traits::kTileM * Traits::kHeadDim);
    } else {
      return shared.own.dq[warpgroup];
    }
  }
};

}  // namespace cute_kernels::attention
