#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/clear.hpp"
#include "cute_kernels/attention/backward/dq.hpp"
#include "cute_kernels/attention/backward/epilogue.hpp"
#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/sm90/bulk_reduce.hpp"
#include "cute_kernels/sm90/semaphore.hpp"

namespace cute_kernels::attention {

/// Moves what one consumer warpgroup hands out to global memory: a slice of dQ for each step, which
/// is added there, and then the gradients of its keys. Of one thread.
template <class Traits, class Params>
class BackwardSender {
  using KeyBlock = typename Traits::KeyBlock;
  using SharedStorage = typename Traits::SharedStorage;
  using Dq = BackwardDq<Traits>;

 public:
  CUTLASS_DEVICE BackwardSender(Params const& params, SharedStorage& shared, int warpgroup)
      : params_(params), shared_(shared), warpgroup_(warpgroup) {}

  /// Calls release() whenever TMA has read a slice; dK is one more. In order, the first to come to
  /// a slice of dQ writes it.
  template <class Release>
  CUTLASS_DEVICE void send(KeyBlock const& coord, Release const& release) {
    if constexpr (Traits::kPersistent) wait_until_cleared(params_, coord);
    for (QuerySteps<Traits, Params> step(params_, coord); step.valid(); step.advance()) {
      if (params_.dq_in_order) sm90::semaphore_wait(step.turns(), step.turn());
      wait_for_consumers();
      float const* const from = Dq::buffer(shared_, warpgroup_, index_);
      float* const to = params_.workspace.dq + step.dq_slice(warpgroup_) * Traits::kSliceFloats;
      constexpr int kBytes = Traits::kSliceFloats * sizeof(float);
      if (params_.dq_in_order && step.turn() == 0) {
        sm90::bulk_store(to, from, kBytes);
      } else {
        sm90::bulk_reduce_add(to, from, kBytes);
      }
      wait_until_read(release);
      if (params_.dq_in_order) {
        sm90::bulk_wait_complete();
        sm90::count_up(&shared_.dq_added[warpgroup_]);
      }
    }
    if constexpr (!Traits::kSplitProducts) {
      using Epilogue = BackwardEpilogue<Traits>;
      using Element = typename Traits::Element;
      shared_.dv_full[warpgroup_].wait(dv_phase_);
      dv_phase_ ^= 1;
      if (!params_.float_grads) {
        Epilogue::template store<Traits::kHeadDimV>(params_.tma_dv, params_,
                                                    shared_.own.dv[warpgroup_], coord, warpgroup_);
      }
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
      wait_for_consumers();
      if (!params_.float_grads) {
        Epilogue::template store<Traits::kHeadDim>(
            params_.tma_dk, params_, reinterpret_cast<Element const*>(shared_.own.dq[warpgroup_]),
            coord, warpgroup_);
      }
      wait_until_read(release);
    }
  }

 private:
  CUTLASS_DEVICE void wait_for_consumers() { shared_.dq_full[warpgroup_][index_].wait(phase_); }

  template <class Release>
  CUTLASS_DEVICE void wait_until_read(Release const& release) {
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();
    release();
    if (++index_ == Traits::kDqBuffers) {
      index_ = 0;
      phase_ ^= 1;
    }
  }

  Params const& params_;
  SharedStorage& shared_;
  int warpgroup_;
  int index_ = 0;
  uint32_t phase_ = 0;
  uint32_t dv_phase_ = 0;
};

/// dQ in order: lets the next key block add to a query block when all slices are complete,
/// which spares those that add the wait for memory that this takes. Of one thread.
template <class Traits, class Params>
class BackwardTurns {
 public:
  CUTLASS_DEVICE BackwardTurns(Params const& params, typename Traits::SharedStorage& shared)
      : params_(params), shared_(shared) {}

  CUTLASS_DEVICE void pass(typename Traits::KeyBlock const& coord) {
    for (QuerySteps<Traits, Params> step(params_, coord); step.valid(); step.advance()) {
      ++done_;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Traits::kConsumers; ++i) {
        sm90::wait_for_count(&shared_.dq_added[i], done_);
      }
      sm90::semaphore_advance(step.turns());
    }
  }

 private:
  Params const& params_;
  typename Traits::SharedStorage& shared_;
  int done_ = 0;
};

}  // namespace cute_kernels::attention
