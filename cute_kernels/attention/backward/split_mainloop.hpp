#pragma once

#include <type_traits>
#include <utility>

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/dq.hpp"
#include "cute_kernels/attention/backward/ds.hpp"
#include "cute_kernels/attention/backward/epilogue.hpp"
#include "cute_kernels/attention/backward/hidden.hpp"
#include "cute_kernels/attention/backward/scores.hpp"
#include "cute_kernels/attention/backward/softcap.hpp"
#include "cute_kernels/attention/backward/softmax.hpp"
#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/sm90/cluster.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// The products of one block of 64 keys, split over two warpgroups by products: the first computes
/// S, P and dV, the second dP, dS and dK. Two CTAs exchange dS; each of the four warpgroups
/// computes a quarter of the channels of dQ for both.
///
/// Who waits for whom, beside what BackwardMainloop says:
/// - p_full: the second warpgroup waits for the first one's P.
/// - ds_full: both wait for the second one's dS, peer_ds_full: and for the other CTA's, which lands
///   in their memory, as peer_k_full says of its keys. ds_empty: the first one, which writes P
///   where dS will be, waits until every consumer warp of both CTAs has read both dS.
/// - The first warpgroup releases dO, the second Q: the other one's reads are over by then. dQ is
///   added straight from registers; in order it leaves through the step's own dO and Q
///   instead, and the threads that add it release their stages. kStageRead: the warpgroup's four
///   warps have done with the stage.
template <class Traits>
class BackwardSplitMainloop {
  using Element = typename Traits::Element;
  using KeyBlock = typename Traits::KeyBlock;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;
  using Dq = BackwardDq<Traits>;
  using Ds = BackwardDs<Traits>;
  using Scores = BackwardScores<Traits>;

  using OperandLayout = typename Traits::ScoresAsOperand;

  static constexpr int kTileM = Traits::kTileM;

 public:
  /// Computes dV or dK and a quarter of dQ, and sends them. Careful about what a mask hides:
  /// HiddenStep.
  template <bool kCareful, class Params>
  CUTLASS_DEVICE static void compute(Params const& params, SharedStorage& shared,
                                     Pipeline& pipeline_q, Pipeline& pipeline_grad_out,
                                     KeyBlock const& coord, int warpgroup) {
    using namespace cute;
    using Epilogue = BackwardEpilogue<Traits>;
    auto gradient = Epilogue::new_gradient();
    bool const is_dv = warpgroup == 0;
    if (Traits::kAnyCall && !QuerySteps<Traits, Params>(params, coord).valid()) {
      // No query sees the keys, and nothing is loaded.
    } else if (is_dv) {
      compute_dv<kCareful>(params, shared, pipeline_q, pipeline_grad_out, coord, gradient);
    } else {
      compute_dk<kCareful>(params, shared, pipeline_q, pipeline_grad_out, coord, gradient);
    }
    auto meet = [] {
      sm90::barrier_sync(sm90::NamedBarrier::kGradientsReady, 0,
                         Traits::kConsumers * cutlass::NumThreadsPerWarpGroup);
    };
    meet();  // done with K and V
    Element* const buffer = is_dv ? shared.v[0] : shared.k.data();
    Epilogue::hand_out(params, is_dv ? params.grad_v : params.grad_k,
                       is_dv ? params.head_dim_v : params.head_dim, coord, 0, buffer, gradient,
                       is_dv ? 1.f : params.softmax_scale);
    tma_store_fence();
    meet();
    if (!params.float_grads && threadIdx.x % cutlass::NumThreadsPerWarpGroup == 0) {
      Epilogue::store(is_dv ? params.tma_dv : params.tma_dk, params, buffer, coord, 0);
      tma_store_arrive();
      tma_store_wait<0>();
    }
  }

 private:
  /// The first warpgroup: adds up dV.
  template <bool kCareful, class Params, class Accumulator>
  CUTLASS_DEVICE static void compute_dv(Params const& params, SharedStorage& shared,
                                        Pipeline& pipeline_q, Pipeline& pipeline_grad_out,
                                        KeyBlock const& coord, Accumulator& dv) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    typename Traits::MmaDkv mma_dkv;
    auto operand_grad_out_t = transposed_operand(shared.grad_out, thread);
    DqOfBoth const dq_of_both(shared, coord, 0, thread);

    int const key = coord.n_block * Traits::kTileN + thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;
    uint4* const p_words = where_p_is(shared, coord);
    PipelineState read;
    uint32_t phase = 0;

    shared.k_full.wait(0);
    if constexpr (kCareful) {
      clear_own_keys<Traits>(params, coord, shared, 0);
    } else {
      check_own_keys<Traits>(params, coord, shared, 0);
    }
    auto const product_s = Scores::template operands<Traits::kKeyBlocksInRegisters>(
        keys(shared.k.data()), shared.q, thread);
    for (QuerySteps<Traits, Params> step(params, coord); step.valid(); step.advance()) {
      auto scores = Scores::accumulator();
      pipeline_q.consumer_wait(read);
      Scores::template issue<Statistic::kLse>(shared, product_s, read.index(), thread, scores);
      int const query = step.block() * kTileM + column;
      warpgroup_wait<0>();
      auto p_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
      using Score = std::conditional_t<Traits::kSoftcap, CappedScore, Exponent>;
      if constexpr (Traits::kSoftcap) apply_softcap(scores, params.softcap_factor);
      if constexpr (kCareful) {
        HiddenStep<Traits> const hidden(shared, step.masked(), 0);
        hidden.template restrict<Score>(p_rows, coord.mask(params), key, query);
        pipeline_grad_out.consumer_wait(read);
        hidden.clear_queries(shared, read.index());
      } else if (step.masked()) {
        coord.mask(params).apply_transposed(p_rows, key, query, -INFINITY);
      }
      auto p = make_tensor<Element>(OperandLayout{});
      auto p_of_ds = make_tensor<Element>(OperandLayout{});  // with a softcap
      if constexpr (Traits::kSoftcap) {
        capped_probabilities<kCareful>(p_rows, shared.statistics[read.index()], column,
                                       params.scale_log2, p, p_of_ds);
      } else {
        scores_to_probabilities(scores, params.scale_log2);
        sm90::convert_fragment<Element>(make_tensor(scores.data(), OperandLayout{}), p);
      }
      auto* parts = reinterpret_cast<uint4 const*>(Traits::kSoftcap ? p_of_ds.data() : p.data());
      shared.ds_empty.wait(phase ^ 1);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kTileM / 16; ++i) {
        p_words[i * cutlass::NumThreadsPerWarpGroup + thread] = parts[i];
      }
      __syncwarp();
      if (thread % cutlass::NumThreadsPerWarp == 0) shared.p_full.arrive();

      pipeline_grad_out.consumer_wait(read);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dkv, p,
                                               operand_grad_out_t(_, _, _, read.index()), dv);
      auto dq = Dq::accumulator();
      dq_of_both.compute(shared, phase, dq);
      send_dq(params, shared, pipeline_grad_out, read, step, 0, thread, dq);
      ++read;
      phase ^= 1;
    }
    if constexpr (kCareful) restore_dv<Traits>(params, shared, coord, key, column, dv);
  }

  /// The second warpgroup: adds up dK (not yet scaled).
  template <bool kCareful, class Params, class Accumulator>
  CUTLASS_DEVICE static void compute_dk(Params const& params, SharedStorage& shared,
                                        Pipeline& pipeline_q, Pipeline& pipeline_grad_out,
                                        KeyBlock const& coord, Accumulator& dk) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    typename Traits::MmaDkv mma_dkv;
    auto operand_qt = transposed_operand(shared.q, thread);
    DqOfBoth const dq_of_both(shared, coord, 1, thread);

    int const rank = Traits::rank(coord.n_block);
    Element* const own_ds = Ds::own_part(shared, 0, thread);
    uint4* const p_words = where_p_is(shared, coord);

    PipelineState read;
    uint32_t phase = 0;

    shared.k_full.wait(0);
    if (kCareful && coord.hides_values(params)) {
      shared.peer_k_full.wait(0);
      WarpRows<Traits::kTileN, Traits::kPeerChannels, Element>(shared.own.data(), thread / 32 * 16)
          .clear();
    }
    int const key = coord.n_block * Traits::kTileN + thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;
    shared.v_full.wait(0);
    if constexpr (Traits::kAnyCall && !kCareful) {
      check_own_values<Traits>(params, coord, shared.v[0]);
    }
    auto const product_dp = Scores::template operands<Traits::kKeyBlocksInRegisters>(
        keys(shared.v[0]), shared.grad_out, thread);
    for (QuerySteps<Traits, Params> step(params, coord); step.valid(); step.advance()) {
      auto gradients = Scores::accumulator();
      pipeline_q.consumer_wait(read);  // delta comes with Q
      pipeline_grad_out.consumer_wait(read);
      Scores::template issue<Statistic::kDelta>(shared, product_dp, read.index(), thread,
                                                gradients);
      if constexpr (kCareful) {
        warpgroup_wait<0>();
        // So does the first, before it hands P on.
        HiddenStep<Traits>(shared, step.masked(), 1).clear_queries(shared, read.index());
      }
      auto p = make_tensor<Element>(gradients.layout());
      auto* parts = reinterpret_cast<uint4*>(p.data());
      shared.p_full.wait(phase);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kTileM / 16; ++i) {
        parts[i] = p_words[i * cutlass::NumThreadsPerWarpGroup + thread];
      }
      // dS overwrites P.
      sm90::barrier_sync(sm90::NamedBarrier::kStageRead, 1, cutlass::NumThreadsPerWarpGroup);
      warpgroup_wait<0>();
      if constexpr (kCareful) {
        auto rows = make_tensor(gradients.data(), sm90::accumulator_rows_cols(gradients.layout()));
        HiddenStep<Traits>(shared, step.masked(), 1)
            .clear(rows, coord.mask(params), key, step.block() * kTileM + column);
      }
      gradients_of_scores(gradients, p);
      auto ds = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(gradients.data(), OperandLayout{}), ds);
      Ds::store(ds, own_ds, rank);
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (thread % cutlass::NumThreadsPerWarp == 0) shared.ds_full[0].arrive();

      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dkv, ds, operand_qt(_, _, _, read.index()), dk);
      auto dq = Dq::accumulator();
      dq_of_both.compute(shared, phase, dq);
      send_dq(params, shared, pipeline_q, read, step, 1, thread, dq);
      ++read;
      phase ^= 1;
    }
  }

  /// P lies where this CTA's dS will.
  CUTLASS_DEVICE static uint4* where_p_is(SharedStorage& shared, KeyBlock const& coord) {
    return reinterpret_cast<uint4*>(shared.ds.data() +
                                    Traits::rank(coord.n_block) * kTileM * Traits::kTileN);
  }

  /// dQ of both CTAs' keys, in a warpgroup's channels of this CTA.
  class DqOfBoth {
   public:
    CUTLASS_DEVICE DqOfBoth(SharedStorage& shared, KeyBlock const& coord, int warpgroup, int thread)
        : rank_(Traits::rank(coord.n_block)),
          sends_(warpgroup == 1 && thread == 0),
          own_(Dq::operands(shared, shared.k, typename Traits::LayoutKt{},
                            rank_ * Traits::kConsumers + warpgroup, thread)),
          peer_(Dq::operands(shared, shared.own, typename Traits::LayoutPeerKt{}, warpgroup,
                             thread)) {}

    template <class Accumulator>
    CUTLASS_DEVICE void compute(SharedStorage& shared, uint32_t phase, Accumulator& dq) const {
      shared.ds_full[0].wait(phase);
      if (sends_) {
        shared.peer_ds_full.arrive_and_expect_tx(Traits::kBytesDs);
        sm90::copy_to_cta(shared.ds.data() + rank_ * kTileM * Traits::kTileN, shared.peer_ds_full,
                          Traits::kBytesDs, rank_ ^ 1);
      }
      Dq::template issue<sm90::Accumulate::kNo>(own_, rank_, dq);
      shared.peer_k_full.wait(0);
      shared.peer_ds_full.wait(phase);
      Dq::template issue<sm90::Accumulate::kYes>(peer_, rank_ ^ 1, dq);
      cute::warpgroup_wait<0>();
      if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
        for (uint32_t cta = 0; cta < Traits::kCluster; ++cta) shared.ds_empty.arrive(cta);
      }
    }

   private:
    int rank_;
    bool sends_;
    decltype(Dq::operands(std::declval<SharedStorage&>(), std::declval<SharedStorage&>().k,
                          typename Traits::LayoutKt{}, 0, 0)) own_;
    decltype(Dq::operands(std::declval<SharedStorage&>(), std::declval<SharedStorage&>().own,
                          typename Traits::LayoutPeerKt{}, 0, 0)) peer_;
  };

  /// A warpgroup's slice of dQ leaves; the step's stage, which it has read last, is released with
  /// it.
  template <class Params, class Step, class Accumulator>
  CUTLASS_DEVICE static void send_dq(Params const& params, SharedStorage& shared,
                                     Pipeline& pipeline, PipelineState const& read,
                                     Step const& step, int warpgroup, int thread,
                                     Accumulator const& dq) {
    if (params.dq_in_order) {
      sm90::barrier_sync(sm90::NamedBarrier::kStageRead, warpgroup,
                         cutlass::NumThreadsPerWarpGroup);
      Dq::write(shared, warpgroup, read.index(), thread, dq);
      Dq::announce(shared, warpgroup, read.index(), thread);
    } else {
      if (thread % cutlass::NumThreadsPerWarp == 0) pipeline.consumer_release(read);
      Dq::add_now(params, step.dq_slice(warpgroup), thread, dq);
    }
  }

  CUTLASS_DEVICE static auto keys(Element* data) {
    return cute::make_tensor(cute::make_smem_ptr(data), typename Traits::LayoutK{});
  }

  /// B of dV += P^T dO, or of dK += dS^T Q.
  template <class Queries>
  CUTLASS_DEVICE static auto transposed_operand(Queries& queries, int thread) {
    using namespace cute;
    auto slice = typename Traits::MmaDkv{}.get_thread_slice(thread);
    return slice.make_fragment_B(
        slice.partition_B(make_tensor(make_smem_ptr(queries.data()), typename Traits::LayoutQt{})));
  }
};

}  // namespace cute_kernels::attention
