#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/dq.hpp"
#include "cute_kernels/attention/backward/ds.hpp"
#include "cute_kernels/attention/backward/hidden.hpp"
#include "cute_kernels/attention/backward/scores.hpp"
#include "cute_kernels/attention/backward/softmax.hpp"
#include "cute_kernels/attention/backward/split_products.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// Split by products like BackwardSplitMainloop, for head dims whose gradients leave registers for
/// one step's scores beside another's dQ. So that the tensor cores have work while P and dS go from
/// one to the other, a warpgroup issues a step's products in this order, each in flight behind the
/// one before: S or dP of the next step; this CTA's part of dQ; then, when the next P or dS is
/// handed on, the other CTA's part of dQ, and dV or dK of the next step.
///
/// Who waits for whom, where it differs:
/// - p_full: as there; but P has memory of its own, and has been read when ds_full says so.
/// - ds_full, peer_ds_full, ds_empty: dS of steps goes to two places in turn, each with barriers of
///   its own. The second warpgroup waits for ds_empty of two steps before.
/// - A stage is released when the next step's S or dP is complete, and so the gradient before it;
///   in order, by whoever adds dQ from there.
template <class Traits>
class BackwardAheadMainloop : public BackwardSplitProducts<Traits> {
  using Base = BackwardSplitProducts<Traits>;
  using Element = typename Traits::Element;
  using KeyBlock = typename Traits::KeyBlock;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;
  using Dq = BackwardDq<Traits>;
  using Ds = BackwardDs<Traits>;
  using Scores = BackwardScores<Traits>;

  template <class Params>
  using Steps = QuerySteps<Traits, Params, Caller::kWarp>;
  using OperandLayout = typename Traits::ScoresAsOperand;

  static constexpr int kTileM = Traits::kTileM;

  /// A step by its number, which its barriers go by, and where its queries and its slice of dQ are.
  struct NumberedStep {
    int number = 0;
    PipelineState stage;
    int64_t slice;

    CUTLASS_DEVICE int place() const { return number % 2; }
    CUTLASS_DEVICE uint32_t phase() const { return number / 2 % 2; }
  };

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
    BackwardDqOfBoth<Traits> const dq_of_both(shared, coord, 0, thread);
    int const key = coord.n_block * Traits::kTileN + thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;
    uint4* const p_words = Base::where_p_is(shared, coord);

    shared.k_full.wait(0);
    if constexpr (kCareful) {
      clear_own_keys<Traits>(params, coord, shared, 0);
    } else {
      check_own_keys<Traits>(params, coord, shared, 0);
    }
    auto const product_s = Scores::template operands<Traits::kKeyBlocksInRegisters>(
        Base::tensor(shared.k.data(), typename Traits::LayoutK{}),
        Base::tensor(shared.q.data(), typename Traits::LayoutQ{}), thread);
    Steps<Params> step(params, coord);
    PipelineState read;
    auto scores = Scores::accumulator();
    auto issue_scores = [&] {
      pipeline_q.consumer_wait(read);
      Scores::template issue<Statistic::kLse>(shared, product_s, read.index(), thread, scores);
    };
    // P of the step, from S.
    auto hand_on = [&] {
      int const query = step.block() * kTileM + column;
      auto p_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
      if constexpr (kCareful) {
        HiddenStep<Traits> const hidden(shared, step.masked(), 0);
        hidden.template restrict<Exponent>(p_rows, coord.mask(params), key, query,
                                           params.scale_log2);
        pipeline_grad_out.consumer_wait(read);
        hidden.clear_queries(shared, read.index());
      } else if (step.masked()) {
        coord.mask(params).apply_transposed(p_rows, key, query, -INFINITY);
      }
      scores_to_probabilities(scores, params.scale_log2);
      auto p = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(scores.data(), OperandLayout{}), p);
      auto const* parts = reinterpret_cast<uint4 const*>(p.data());
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kTileM / 16; ++i) {
        p_words[i * cutlass::NumThreadsPerWarpGroup + thread] = parts[i];
      }
      __syncwarp();
      if (thread % cutlass::NumThreadsPerWarp == 0) shared.p_full.arrive();
      return p;
    };
    auto issue_dv = [&](auto const& p) {
      pipeline_grad_out.consumer_wait(read);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dv, p, operand_grad_out_t(_, _, _, read.index()),
                                               dv);
    };
    issue_scores();
    shared.peer_k_full.wait(0);
    warpgroup_wait<0>();
    issue_dv(hand_on());
    auto dq = Dq::accumulator();
    NumberedStep last;
    auto begin_dq = [&] {
      dq_of_both.exchange(shared, last.place(), last.phase());
      dq_of_both.issue_own(last.place(), dq);
    };
    while (true) {
      last.stage = read;
      last.slice = step.dq_slice(0);
      ++read;
      step.advance();
      if (!step.valid()) break;
      issue_scores();
      begin_dq();
      warpgroup_wait<1>();  // S, and the last dV before it
      release_stage(params, pipeline_grad_out, last.stage);
      auto const p = hand_on();
      dq_of_both.await_peer(shared, last.place(), last.phase());
      dq_of_both.issue_peer(last.place(), dq);
      issue_dv(p);
      warpgroup_wait<1>();  // dQ
      send(params, shared, dq_of_both, last, 0, thread, dq);
      ++last.number;
    }
    begin_dq();
    dq_of_both.await_peer(shared, last.place(), last.phase());
    dq_of_both.issue_peer(last.place(), dq);
    warpgroup_wait<0>();
    send(params, shared, dq_of_both, last, 0, thread, dq);
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
    BackwardDqOfBoth<Traits> const dq_of_both(shared, coord, 1, thread);
    int const rank = Traits::rank(coord.n_block);
    Element* const own_ds = Ds::own_part(shared, 0, thread);
    uint4 const* const p_words = Base::where_p_is(shared, coord);

    shared.k_full.wait(0);
    shared.peer_k_full.wait(0);
    if (kCareful && coord.hides_values(params)) {
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
    Steps<Params> step(params, coord);
    PipelineState read;
    auto gradients = Scores::accumulator();
    auto issue_scores = [&] {
      pipeline_q.consumer_wait(read);  // delta comes with Q
      pipeline_grad_out.consumer_wait(read);
      Scores::template issue<Statistic::kDelta>(shared, product_dp, read.index(), thread,
                                                gradients);
    };
    // dS of the step, from dP and P.
    auto hand_on = [&](NumberedStep const& now) {
      if constexpr (kCareful) {
        // So does the first, before it hands P on.
        HiddenStep<Traits>(shared, step.masked(), 1).clear_queries(shared, read.index());
      }
      auto p = make_tensor<Element>(gradients.layout());
      auto* parts = reinterpret_cast<uint4*>(p.data());
      shared.p_full.wait(now.number % 2);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kTileM / 16; ++i) {
        parts[i] = p_words[i * cutlass::NumThreadsPerWarpGroup + thread];
      }
      if constexpr (kCareful) {
        auto rows = make_tensor(gradients.data(), sm90::accumulator_rows_cols(gradients.layout()));
        HiddenStep<Traits>(shared, step.masked(), 1)
            .clear(rows, coord.mask(params), key, step.block() * kTileM + column);
      }
      gradients_of_scores(gradients, p);
      auto ds = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(gradients.data(), OperandLayout{}), ds);
      shared.ds_empty[now.place()].wait(now.phase() ^ 1);
      Ds::store(ds, own_ds, dq_of_both.buffer(now.place(), rank));
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (thread % cutlass::NumThreadsPerWarp == 0) shared.ds_full[now.place()].arrive();
      return ds;
    };
    auto issue_dk = [&](auto const& ds) {
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dk, ds, operand_qt(_, _, _, read.index()), dk);
    };
    issue_scores();
    warpgroup_wait<0>();
    auto dq = Dq::accumulator();
    NumberedStep last;
    issue_dk(hand_on(last));
    while (true) {
      dq_of_both.exchange(shared, last.place(), last.phase());
      last.stage = read;
      last.slice = step.dq_slice(1);
      ++read;
      step.advance();
      if (!step.valid()) break;
      issue_scores();
      dq_of_both.issue_own(last.place(), dq);
      warpgroup_wait<1>();  // dP, and the last dK before it
      release_stage(params, pipeline_q, last.stage);
      NumberedStep next = last;
      ++next.number;
      auto const ds = hand_on(next);
      dq_of_both.await_peer(shared, last.place(), last.phase());
      dq_of_both.issue_peer(last.place(), dq);
      issue_dk(ds);
      warpgroup_wait<1>();  // dQ
      send(params, shared, dq_of_both, last, 1, thread, dq);
      last = next;
    }
    dq_of_both.issue_own(last.place(), dq);
    dq_of_both.await_peer(shared, last.place(), last.phase());
    dq_of_both.issue_peer(last.place(), dq);
    warpgroup_wait<0>();
    send(params, shared, dq_of_both, last, 1, thread, dq);
  }

 private:
  /// In no order, of whoever reads a stage last. In order the memory is still needed.
  template <class Params>
  CUTLASS_DEVICE static void release_stage(Params const& params, Pipeline& pipeline,
                                           PipelineState const& stage) {
    if (!params.dq_in_order && threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
      pipeline.consumer_release(stage);
    }
  }

  /// dQ is complete: dS has been read, and the slice leaves.
  template <class Params, class Accumulator>
  CUTLASS_DEVICE static void send(Params const& params, SharedStorage& shared,
                                  BackwardDqOfBoth<Traits> const& dq_of_both,
                                  NumberedStep const& step, int warpgroup, int thread,
                                  Accumulator const& dq) {
    dq_of_both.release(shared, step.place());
    Base::send_dq(params, shared, warpgroup, step.stage.index(), step.slice, thread, dq, [] {});
  }
};

}  // namespace cute_kernels::attention
