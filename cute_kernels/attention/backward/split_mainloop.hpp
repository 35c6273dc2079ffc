#pragma once

#include <type_traits>

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/changed.hpp"
#include "cute_kernels/attention/backward/dq.hpp"
#include "cute_kernels/attention/backward/ds.hpp"
#include "cute_kernels/attention/backward/epilogue.hpp"
#include "cute_kernels/attention/backward/hidden.hpp"
#include "cute_kernels/attention/backward/scores.hpp"
#include "cute_kernels/attention/backward/softmax.hpp"
#include "cute_kernels/attention/backward/split_products.hpp"
#include "cute_kernels/attention/backward/steps.hpp"
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
class BackwardSplitMainloop : public BackwardSplitProducts<Traits> {
  using Base = BackwardSplitProducts<Traits>;
  using Element = typename Traits::Element;
  using KeyBlock = typename Traits::KeyBlock;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;
  using Dq = BackwardDq<Traits>;
  using DqOfBoth = BackwardDqOfBoth<Traits>;
  using Ds = BackwardDs<Traits>;
  using Scores = BackwardScores<Traits>;
  using Variant = typename Traits::Variant;
  static_assert(!Variant::kWeighs && Variant::kGradients == 0, "P has one way to dS");

  template <class Params>
  using Steps = QuerySteps<Traits, Params, Caller::kWarp>;
  using OperandLayout = typename Traits::ScoresAsOperand;

  static constexpr int kTileM = Traits::kTileM;

 public:
  /// The first warpgroup: adds up dV.
  template <bool kCareful, class Params, class Accumulator>
  CUTLASS_DEVICE static void compute_dv(Params const& params, SharedStorage& shared,
                                        Pipeline& pipeline_q, Pipeline& pipeline_grad_out,
                                        KeyBlock const& coord, Accumulator& dv) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    typename Traits::MmaDv mma_dv;
    auto operand_grad_out_t = Base::transposed_operand(mma_dv, shared.grad_out,
                                                       typename Traits::LayoutGradOutT{}, thread);
    DqOfBoth const dq_of_both(shared, coord, 0, thread);

    int const key = coord.n_block * Traits::kTileN + thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;
    uint4* const p_words = Base::where_p_is(shared, coord);
    PipelineState read;
    uint32_t phase = 0;

    shared.k_full.wait(0);
    if constexpr (kCareful) {
      clear_own_keys<Traits>(params, coord, shared, 0);
    } else {
      check_own_keys<Traits>(params, coord, shared, 0);
    }
    auto const product_s = Scores::template operands<Traits::kKeyBlocksInRegisters>(
        Base::tensor(shared.k.data(), typename Traits::LayoutK{}),
        Base::tensor(shared.q.data(), typename Traits::LayoutQ{}), thread);
    auto const of_sequence = places_of<Traits, Caller::kWarp>(params, coord);
    for (Steps<Params> step(params, coord); step.valid(); step.advance()) {
      auto scores = Scores::accumulator();
      pipeline_q.consumer_wait(read);
      Scores::template issue<Statistic::kLse>(shared, product_s, read.index(), thread, scores);
      int const query = step.block() * kTileM + column;
      auto p_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
      auto const places = of_sequence.of_head(step.head());
      auto place = [&] { return transposed_places<Traits>(places, key, query); };
      auto const shown = shown_elements<Variant>(params, p_rows, place, kCareful || step.is_full());
      warpgroup_wait<0>();
      using Score = std::conditional_t<Traits::kChanges, RawScore<Variant>, Exponent>;
      if constexpr (Traits::kChanges) Variant::prepare(params, scores);
      if constexpr (kCareful) {
        HiddenStep<Traits> const hidden(shared, step.hides_some(), 0);
        hidden.template restrict<Score>(p_rows,
                                        mask_of_step<Traits>(params, coord, places, step.is_full()),
                                        key, query, params.scale_log2);
        pipeline_grad_out.consumer_wait(read);
        hidden.clear_queries(shared, read.index());
      } else {
        if (step.masked()) {
          coord.mask(params).apply_transposed(p_rows, key, query, Variant::kHidden);
        }
        shown.hide_others(p_rows, Variant::kHidden);
      }
      auto p = make_tensor<Element>(OperandLayout{});
      ChangedProbabilities<Element, OperandLayout, Variant> changed;
      if constexpr (Traits::kChanges) {
        changed_probabilities_of<kCareful, Variant>(step.hides_some(), params, p_rows, place(),
                                                    shared.statistics[read.index()], column,
                                                    changed);
      } else {
        scores_to_probabilities(scores, params.scale_log2);
        sm90::convert_fragment<Element>(make_tensor(scores.data(), OperandLayout{}), p);
      }
      auto* parts =
          reinterpret_cast<uint4 const*>(Traits::kChanges ? changed.of_dp().data() : p.data());
      shared.ds_empty[0].wait(phase ^ 1);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kTileM / 16; ++i) {
        p_words[i * cutlass::NumThreadsPerWarpGroup + thread] = parts[i];
      }
      __syncwarp();
      if (thread % cutlass::NumThreadsPerWarp == 0) shared.p_full.arrive();

      pipeline_grad_out.consumer_wait(read);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dv, Traits::kChanges ? changed.p : p,
                                               operand_grad_out_t(_, _, _, read.index()), dv);
      auto dq = Dq::accumulator();
      compute_dq(shared, dq_of_both, phase, dq);
      Base::send_dq(params, shared, 0, read.index(), step.dq_slice(0), thread, dq,
                    [&] { pipeline_grad_out.consumer_release(read); });
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
    typename Traits::MmaDk mma_dk;
    auto operand_qt =
        Base::transposed_operand(mma_dk, shared.q, typename Traits::LayoutQt{}, thread);
    DqOfBoth const dq_of_both(shared, coord, 1, thread);

    int const rank = Traits::rank(coord.n_block);
    Element* const own_ds = Ds::own_part(shared, 0, thread);
    uint4* const p_words = Base::where_p_is(shared, coord);

    PipelineState read;
    uint32_t phase = 0;

    shared.k_full.wait(0);
    if (kCareful && hides_values<Traits>(params, coord)) {
      shared.peer_k_full.wait(0);
      WarpRows<Traits::kTileN, Traits::kPeerChannels, Traits::kKeyColumns, Element>(
          shared.own.data(), thread / 32 * 16)
          .clear();
    }
    int const key = coord.n_block * Traits::kTileN + thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;
    shared.v_full.wait(0);
    if constexpr (Traits::kAnyCall && !kCareful) {
      check_own_values<Traits>(params, coord, shared.v[0]);
    }
    auto const product_dp = Scores::template operands<Traits::kValueBlocksInRegisters>(
        Base::tensor(shared.v[0], typename Traits::LayoutV{}),
        Base::tensor(shared.grad_out.data(), typename Traits::LayoutGradOut{}), thread);
    auto const of_sequence = places_of<Traits, Caller::kWarp>(params, coord);
    for (Steps<Params> step(params, coord); step.valid(); step.advance()) {
      auto gradients = Scores::accumulator();
      pipeline_q.consumer_wait(read);  // delta comes with Q
      pipeline_grad_out.consumer_wait(read);
      Scores::template issue<Statistic::kDelta>(shared, product_dp, read.index(), thread,
                                                gradients);
      if constexpr (kCareful) {
        warpgroup_wait<0>();
        // So does the first, before it hands P on.
        HiddenStep<Traits>(shared, step.hides_some(), 1).clear_queries(shared, read.index());
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
        auto const places = of_sequence.of_head(step.head());
        HiddenStep<Traits>(shared, step.hides_some(), 1)
            .clear(rows, mask_of_step<Traits>(params, coord, places, step.is_full()), key,
                   step.block() * kTileM + column);
      }
      gradients_of_scores(gradients, p);
      auto ds = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(gradients.data(), OperandLayout{}), ds);
      Ds::store(ds, own_ds, rank);
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (thread % cutlass::NumThreadsPerWarp == 0) shared.ds_full[0].arrive();

      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dk, ds, operand_qt(_, _, _, read.index()), dk);
      auto dq = Dq::accumulator();
      compute_dq(shared, dq_of_both, phase, dq);
      Base::send_dq(params, shared, 1, read.index(), step.dq_slice(1), thread, dq,
                    [&] { pipeline_q.consumer_release(read); });
      ++read;
      phase ^= 1;
    }
  }

 private:
  template <class Accumulator>
  CUTLASS_DEVICE static void compute_dq(SharedStorage& shared, DqOfBoth const& dq_of_both,
                                        uint32_t phase, Accumulator& dq) {
    dq_of_both.exchange(shared, 0, phase);
    dq_of_both.issue_own(0, dq);
    shared.peer_k_full.wait(0);
    dq_of_both.await_peer(shared, 0, phase);
    dq_of_both.issue_peer(0, dq);
    cute::warpgroup_wait<0>();
    dq_of_both.release(shared, 0);
  }
};

}  // namespace cute_kernels::attention
