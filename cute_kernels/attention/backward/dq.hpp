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
  /// A and B of the slice's product; the one that is dS has a mode of buffers.
  CUTLASS_DEVICE static auto operands(SharedStorage& shared, int warpgroup, int thread) {
    using namespace cute;
    auto ds = make_tensor(make_smem_ptr(shared.ds.data()), typename Traits::LayoutDs{});
    auto kt = make_tensor(make_smem_ptr(shared.k.data()), typename Traits::LayoutKt{});
    auto own_kt = local_tile(kt, Shape<Int<Traits::kDqChannels>, Int<Traits::kTileN>>{},
                             make_coord(kByQueries ? 0 : warpgroup, _0{}));
    auto own_ds = local_tile(ds, Shape<Int<Traits::kDqQueries>, Int<Traits::kTileN>>{},
                             make_coord(kByQueries ? warpgroup : 0, _0{}));
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

  template <class Operands, class Accumulator>
  CUTLASS_DEVICE static void issue(Operands const& operands, int buffer, Accumulator& dq) {
    using namespace cute;
    typename Traits::MmaDq mma;
    if constexpr (Traits::kDqTransposed) {
      sm90::issue_gemm<sm90::Accumulate::kNo>(mma, get<0>(operands),
                                              get<1>(operands)(_, _, _, buffer), dq);
    } else {
      sm90::issue_gemm<sm90::Accumulate::kNo>(mma, get<0>(operands)(_, _, _, buffer),
                                              get<1>(operands), dq);
    }
  }

  /// Registers to shared memory, for add() to take from there.
  template <class Accumulator>
  CUTLASS_DEVICE static void hand_out(SharedStorage& shared, int warpgroup, int index, int thread,
                                      Accumulator const& dq) {
    auto* target = reinterpret_cast<float4*>(buffer(shared, warpgroup, index)) + thread;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(dq) / 4; ++i) {
      target[i * cutlass::NumThreadsPerWarpGroup] =
          make_float4(dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
    }
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (thread % cutlass::NumThreadsPerWarp == 0) shared.dq_full[warpgroup][index].arrive();
  }

  /// Registers to global memory, in no particular order.
  template <class Params, class Accumulator>
  CUTLASS_DEVICE static void add_now(Params const& params, int64_t block_index, int slice,
                                     int thread, Accumulator const& dq) {
    float* target = params.workspace.dq +
                    (block_index * Traits::kConsumers + slice) * Traits::kSliceFloats + 4 * thread;
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
      int64_t const slice = step.block_index() * Traits::kConsumers + warpgroup;
      if (params.deterministic) {
        sm90::semaphore_wait(params.workspace.turns + step.block_index(), step.turn());
      }
      shared.dq_full[warpgroup][index].wait(phase);
      float* const target = params.workspace.dq + slice * Traits::kSliceFloats;
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
      sm90::semaphore_advance(params.workspace.turns + step.block_index());
    }
  }

 private:
  static constexpr bool kByQueries = Traits::kDqSplit == DqSplit::kQueries;

  CUTLASS_DEVICE static float* buffer(SharedStorage& shared, int warpgroup, int index) {
    if constexpr (Traits::kSplitProducts) {
      auto& stages = warpgroup == 0 ? shared.grad_out : shared.q;
      return reinterpret_cast<float*>(stages.data()) + index * Traits::kSliceFloats;
    } else {
      return shared.own.dq[warpgroup];
    }
  }
};

}  // namespace cute_kernels::attention
