#pragma once

#include <utility>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/dq.hpp"
#include "cute_kernels/attention/backward/epilogue.hpp"
#include "cute_kernels/attention/backward/hidden.hpp"
#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/sm90/cluster.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// dQ of the keys of both CTAs of a cluster, in a warpgroup's channels of this CTA. A step's dS are
/// in one of kDsSteps places, this CTA's beside the other's.
template <class Traits>
class BackwardDqOfBoth {
  using SharedStorage = typename Traits::SharedStorage;
  using Dq = BackwardDq<Traits>;

 public:
  CUTLASS_DEVICE BackwardDqOfBoth(SharedStorage& shared, typename Traits::KeyBlock const& coord,
                                  int warpgroup, int thread)
      : rank_(Traits::rank(coord.n_block)),
        sends_(warpgroup == 1 && thread == 0),
        own_(Dq::operands(shared, shared.k, typename Traits::LayoutKt{},
                          rank_ * Traits::kConsumers + warpgroup, thread)),
        peer_(
            Dq::operands(shared, shared.own, typename Traits::LayoutPeerKt{}, warpgroup, thread)) {}

  /// Waits until this CTA's dS is written, and sends it to the other one.
  CUTLASS_DEVICE void exchange(SharedStorage& shared, int place, uint32_t phase) const {
    shared.ds_full[place].wait(phase);
    if (sends_) {
      shared.peer_ds_full[place].arrive_and_expect_tx(Traits::kBytesDs);
      sm90::copy_to_cta(shared.ds.data() + buffer(place, rank_) * Traits::kTileM * Traits::kTileN,
                        shared.peer_ds_full[place], Traits::kBytesDs, rank_ ^ 1);
    }
  }

  CUTLASS_DEVICE void await_peer(SharedStorage& shared, int place, uint32_t phase) const {
    shared.peer_ds_full[place].wait(phase);
  }

  template <class Accumulator>
  CUTLASS_DEVICE void issue_own(int place, Accumulator& dq) const {
    Dq::template issue<sm90::Accumulate::kNo>(own_, buffer(place, rank_), dq);
  }
  template <class Accumulator>
  CUTLASS_DEVICE void issue_peer(int place, Accumulator& dq) const {
    Dq::template issue<sm90::Accumulate::kYes>(peer_, buffer(place, rank_ ^ 1), dq);
  }

  /// The warp has read both dS.
  CUTLASS_DEVICE void release(SharedStorage& shared, int place) const {
    if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
      for (uint32_t cta = 0; cta < Traits::kCluster; ++cta) shared.ds_empty[place].arrive(cta);
    }
  }

  CUTLASS_DEVICE static int buffer(int place, int rank) { return place * Traits::kCluster + rank; }

 private:
  int rank_;
  bool sends_;
  decltype(Dq::operands(std::declval<SharedStorage&>(), std::declval<SharedStorage&>().k,
                        typename Traits::LayoutKt{}, 0, 0)) own_;
  decltype(Dq::operands(std::declval<SharedStorage&>(), std::declval<SharedStorage&>().own,
                        typename Traits::LayoutPeerKt{}, 0, 0)) peer_;
};

/// What the mainloops that split by products have in common. They have compute_dv() and
/// compute_dk(), one for each warpgroup.
template <class Traits>
class BackwardSplitProducts {
  using Element = typename Traits::Element;
  using KeyBlock = typename Traits::KeyBlock;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using Dq = BackwardDq<Traits>;

 public:
  /// Computes dV or dK and a quarter of dQ, and sends them. Careful about what a mask hides:
  /// HiddenStep.
  template <class Mainloop, bool kCareful, class Params>
  CUTLASS_DEVICE static void compute(Params const& params, SharedStorage& shared,
                                     Pipeline& pipeline_q, Pipeline& pipeline_grad_out,
                                     KeyBlock const& coord, int warpgroup) {
    using Epilogue = BackwardEpilogue<Traits>;
    // Where no query sees the keys nothing is loaded.
    bool const is_seen = !Traits::kAnyCall || Steps<Params>(params, coord).valid();
    if (warpgroup == 0) {
      auto dv = Epilogue::template new_gradient<Traits::kHeadDimV>();
      if (is_seen) {
        Mainloop::template compute_dv<kCareful>(params, shared, pipeline_q, pipeline_grad_out,
                                                coord, dv);
      }
      hand_out<Traits::kHeadDimV>(params.tma_dv, params, params.grad_v, params.head_dim_v,
                                  shared.v[0], coord, dv, 1.f);
    } else {
      auto dk = Epilogue::template new_gradient<Traits::kHeadDim>();
      if (is_seen) {
        Mainloop::template compute_dk<kCareful>(params, shared, pipeline_q, pipeline_grad_out,
                                                coord, dk);
      }
      if constexpr (!kCareful) check_gradient<Traits>(params, dk);
      hand_out<Traits::kHeadDim>(params.tma_dk, params, params.grad_k, params.head_dim,
                                 shared.k.data(), coord, dk, params.softmax_scale);
    }
  }

 protected:
  template <class Params>
  using Steps = QuerySteps<Traits, Params, Caller::kWarp>;

  template <class Layout>
  CUTLASS_DEVICE static auto tensor(Element* data, Layout layout) {
    return cute::make_tensor(cute::make_smem_ptr(data), layout);
  }

  /// B of dV += P^T dO, or of dK += dS^T Q.
  template <class Mma, class Queries, class Layout>
  CUTLASS_DEVICE static auto transposed_operand(Mma mma, Queries& queries, Layout layout,
                                                int thread) {
    auto slice = mma.get_thread_slice(thread);
    return slice.make_fragment_B(slice.partition_B(tensor(queries.data(), layout)));
  }

  /// Where the first warpgroup leaves P for the second: memory of its own, or where this CTA's dS
  /// will be.
  CUTLASS_DEVICE static uint4* where_p_is(SharedStorage& shared, KeyBlock const& coord) {
    int const buffer = Traits::kScoresAhead ? Traits::kDsBuffers - 1 : Traits::rank(coord.n_block);
    return reinterpret_cast<uint4*>(shared.ds.data() + buffer * Traits::kTileM * Traits::kTileN);
  }

  /// A warpgroup's slice of a step's dQ leaves from registers, or in order through the step's
  /// stage of dO or Q, which the warpgroup has read last, and whoever adds it releases; otherwise
  /// release() is called, by one thread of a warp.
  template <class Params, class Accumulator, class Release>
  CUTLASS_DEVICE static void send_dq(Params const& params, SharedStorage& shared, int warpgroup,
                                     int stage, int64_t slice, int thread, Accumulator const& dq,
                                     Release const& release) {
    if (params.dq_in_order) {
      sm90::barrier_sync(sm90::NamedBarrier::kStageRead, warpgroup,
                         cutlass::NumThreadsPerWarpGroup);
      Dq::write(shared, warpgroup, stage, thread, dq);
      Dq::announce(shared, warpgroup, stage, thread);
    } else {
      if (thread % cutlass::NumThreadsPerWarp == 0) release();
      Dq::add_now(params, slice, thread, dq);
    }
  }

  /// A gradient leaves from where its keys were.
  template <int kChannels, class Tma, class Params, class Accumulator>
  CUTLASS_DEVICE static void hand_out(Tma const& tma, Params const& params, TensorView const& grad,
                                      int channels, Element* buffer, KeyBlock const& coord,
                                      Accumulator& gradient, float factor) {
    using Epilogue = BackwardEpilogue<Traits>;
    auto meet = [] {
      sm90::barrier_sync(sm90::NamedBarrier::kGradientsReady, 0,
                         Traits::kConsumers * cutlass::NumThreadsPerWarpGroup);
    };
    meet();  // done with K and V
    Epilogue::template hand_out<kChannels>(params, grad, channels, coord, 0, buffer, gradient,
                                           factor);
    cute::tma_store_fence();
    meet();
    if (!params.float_grads && threadIdx.x % cutlass::NumThreadsPerWarpGroup == 0) {
      Epilogue::template store<kChannels>(tma, params, buffer, coord, 0);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }
};

}  // namespace cute_kernels::attention
