#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/captured_gradients.hpp"
#include "cute_kernels/attention/backward/changed.hpp"
#include "cute_kernels/attention/backward/dq.hpp"
#include "cute_kernels/attention/backward/ds.hpp"
#include "cute_kernels/attention/backward/epilogue.hpp"
#include "cute_kernels/attention/backward/hidden.hpp"
#include "cute_kernels/attention/backward/scores.hpp"
#include "cute_kernels/attention/backward/softmax.hpp"
#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// The products of one block of keys, split over the warpgroups by keys (FlashAttention-2, arXiv
/// 2307.08691, algorithm 2, with FlashAttention-3's warp roles).
///
/// Who waits for whom:
/// - k_full, v_full, and full of the q and grad_out pipelines: consumers wait for the producer's
///   TMA. Empty, and keys_empty: the producer waits for every consumer warp.
/// - ds_full[b]: dQ's product waits until every consumer warp has written its part of dS.
/// - dq_full[i]: the thread that sends what warpgroup i hands out waits for the four warps of i.
///   dq_empty[i]: these wait until TMA has read their last slice. dK goes the same way, as one more
///   slice; dv_full[i]: and dV before it.
/// - turns (dQ in order): that thread waits for the same slice of the key blocks before.
template <class Traits>
class BackwardMainloop {
  using Element = typename Traits::Element;
  using KeyBlock = typename Traits::KeyBlock;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;
  using Dq = BackwardDq<Traits>;
  using Ds = BackwardDs<Traits>;
  using Epilogue = BackwardEpilogue<Traits>;
  using Scores = BackwardScores<Traits>;
  using Variant = typename Traits::Variant;

  using OperandLayout = typename Traits::ScoresAsOperand;
  using ScoreRows = decltype(sm90::accumulator_rows_cols(Scores::accumulator().layout()));

  static constexpr int kTileM = Traits::kTileM;
  static constexpr bool kStatisticsByProduct = Traits::kStatisticsByProduct;

 public:
  CUTLASS_DEVICE BackwardMainloop(SharedStorage& shared, Pipeline& pipeline_q,
                                  Pipeline& pipeline_grad_out, int warpgroup)
      : shared_(shared),
        pipeline_q_(pipeline_q),
        pipeline_grad_out_(pipeline_grad_out),
        warpgroup_(warpgroup) {}

  /// Computes and hands out dK and dV of the warpgroup's 64 keys, and its part of their dQ. Careful
  /// about what a mask hides: HiddenStep.
  template <bool kCareful, class Params>
  CUTLASS_DEVICE void compute(Params const& params, KeyBlock const& coord) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    typename Traits::MmaDk mma_dk;
    typename Traits::MmaDv mma_dv;
    auto slice_dk = mma_dk.get_thread_slice(thread);
    auto slice_dv = mma_dv.get_thread_slice(thread);

    auto tensor = [](auto& buffer, auto layout) {
      return make_tensor(make_smem_ptr(buffer.data()), layout);
    };
    auto own_k = local_tile(tensor(shared_.k, typename Traits::LayoutK{}),
                            Shape<Int<Traits::kWarpgroupN>, Int<Traits::kHeadDim>>{},
                            make_coord(warpgroup_, _0{}));
    auto own_v = make_tensor(make_smem_ptr(shared_.v[warpgroup_]), typename Traits::LayoutV{});
    auto operand_qt = slice_dk.make_fragment_B(
        slice_dk.partition_B(tensor(shared_.q, typename Traits::LayoutQt{})));
    auto operand_grad_out_t = slice_dv.make_fragment_B(
        slice_dv.partition_B(tensor(shared_.grad_out, typename Traits::LayoutGradOutT{})));
    auto operands_dq =
        Dq::operands(shared_, shared_.k, typename Traits::LayoutKt{}, warpgroup_, thread);

    Element* const own_ds = Ds::own_part(shared_, warpgroup_, thread);

    int const key = coord.n_block * Traits::kTileN + warpgroup_ * Traits::kWarpgroupN +
                    thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;

    PipelineState read_by_dk = read_q_;  // the Q of the product in flight when a step ends
    bool first_step = true;
    auto dk = Epilogue::template new_gradient<Traits::kHeadDim>();
    auto dv = Epilogue::template new_gradient<Traits::kHeadDimV>();
    CapturedGradients<Traits> captured_gradients;

    ShuffledRowStatistic<kTileM> lse_log2, minus_delta;
    auto await_queries = [&] {
      pipeline_q_.consumer_wait(read_q_);
      if constexpr (!kStatisticsByProduct) {
        lse_log2.load(shared_.statistics[read_q_.index()].lse_log2, thread);
        minus_delta.load(shared_.statistics[read_q_.index()].minus_delta, thread);
      }
      pipeline_grad_out_.consumer_wait(read_grad_out_);
    };
    // The last step's dK is complete when no more than `in_flight` products are not.
    auto finish_last_step = [&](auto in_flight) {
      warpgroup_wait<in_flight>();
      if (!first_step) release(pipeline_q_, read_by_dk);
    };

    KeyBlockSteps<Traits, Params, Caller::kWarp> const steps(params, coord);
    if constexpr (Traits::kAnyCall) {
      if (!steps.any()) return hand_out_zeros(params, coord);
    }
    shared_.k_full.wait(keys_phase_);
    if constexpr (kCareful) {
      clear_own_keys<Traits>(params, coord, shared_, warpgroup_);
    } else {
      check_own_keys<Traits>(params, coord, shared_, warpgroup_);
    }
    shared_.v_full.wait(keys_phase_);
    keys_phase_ ^= 1;
    if constexpr (Traits::kAnyCall && !kCareful) {
      check_own_values<Traits>(params, coord, shared_.v[warpgroup_]);
    }
    auto const product_s = Scores::template operands<Traits::kKeyBlocksInRegisters>(
        own_k, tensor(shared_.q, typename Traits::LayoutQ{}), thread);
    auto const product_dp = Scores::template operands<Traits::kValueBlocksInRegisters>(
        own_v, tensor(shared_.grad_out, typename Traits::LayoutGradOut{}), thread);
    await_queries();
    auto const of_sequence = places_of<Traits, Caller::kWarp>(params, coord);
    auto step = steps.first();
    // Which elements of a step hooks show: they are asked a step ahead, under the last one's dQ and
    // dK, since what they load would come too late under the products of scores.
    auto ask = [&] {
      auto const places = of_sequence.of_head(step.head());
      int const query = step.block() * kTileM + column;
      auto const known = [&] {
        if constexpr (Traits::kSharesMask) {
          return KnownMask<kTileM>{
              step.shared_words(threadIdx.x - cutlass::NumThreadsPerWarpGroup)};
        } else {
          return NothingKnown{};
        }
      };
      return shown_elements<Variant>(
          params, ScoreRows{}, [&] { return transposed_places<Traits>(places, key, query); },
          kCareful || step.is_full(), known());
    };
    auto shown = ask();
    for (bool more = step.valid(); more;) {
      // S^T and dP^T, back to back.
      auto scores = Scores::accumulator();
      auto gradients = Scores::accumulator();
      auto p_rows = make_tensor(scores.data(), ScoreRows{});
      if constexpr (!Traits::kScoresBehindDk) finish_last_step(_0{});
      Scores::template issue<Statistic::kLse>(shared_, product_s, read_q_.index(), thread, scores);
      if constexpr (Traits::kScoresBehindDk) finish_last_step(_1{});
      Scores::template issue<Statistic::kDelta>(shared_, product_dp, read_q_.index(), thread,
                                                gradients);
      if (!first_step) Dq::announce(shared_, warpgroup_, 0, thread);
      first_step = false;

      int const query = step.block() * kTileM + column;
      auto const places = of_sequence.of_head(step.head());
      auto place = [&] { return transposed_places<Traits>(places, key, query); };
      auto p = make_tensor<Element>(OperandLayout{});
      ChangedProbabilities<Element, OperandLayout, Variant> changed;
      auto const& statistics = shared_.statistics[read_q_.index()];
      warpgroup_wait<1>();
      if constexpr (Traits::kChanges) Variant::prepare(params, scores);
      if constexpr (!kCareful) {
        if (step.masked()) {
          coord.mask(params).apply_transposed(p_rows, key, query, Variant::kHidden);
        }
        shown.hide_others(p_rows, Variant::kHidden);
      }
      auto hidden_step = [&] { return HiddenStep<Traits>(shared_, step.hides_some(), warpgroup_); };
      auto mask = [&]() -> decltype(auto) {
        return mask_of_step<Traits>(params, coord, places, step.is_full());
      };
      if constexpr (Traits::kChanges) {
        if constexpr (kCareful) {
          hidden_step().template restrict<RawScore<Variant>>(p_rows, mask(), key, query);
        }
        changed_probabilities_of<kCareful, Variant>(step.hides_some(), params, p_rows, place(),
                                                    statistics, column, changed);
      } else if constexpr (kStatisticsByProduct) {
        scores_to_probabilities(scores, params.scale_log2);
      } else {
        scores_to_probabilities(p_rows, lse_log2, params.scale_log2);
      }
      warpgroup_wait<0>();
      auto ds_rows = make_tensor(gradients.data(), p_rows.layout());
      if constexpr (!kStatisticsByProduct) subtract_delta(ds_rows, minus_delta);
      if constexpr (kCareful) {
        HiddenStep<Traits> const hidden = hidden_step();
        if constexpr (!Traits::kChanges) {
          hidden.template restrict<Probability>(p_rows, mask(), key, query);
        }
        hidden.clear(ds_rows, mask(), key, query);
        hidden.clear_queries(shared_, read_q_.index());
      }
      if constexpr (Traits::kChanges) {
        if constexpr (Variant::kGradients > 0) {
          captured_gradients.add(params, ds_rows, places, key, query, changed);
        }
        gradients_of_changed<kCareful, Variant>(ds_rows, statistics, column, changed);
      } else {
        gradients_of_scores(gradients, scores);
        sm90::convert_fragment<Element>(make_tensor(scores.data(), OperandLayout{}), p);
      }
      auto ds = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(gradients.data(), OperandLayout{}), ds);
      Ds::store(ds, own_ds, ds_buffer_);

      // dS becomes visible to everyone while dV is in flight.
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dv, Traits::kChanges ? changed.p : p,
                                               operand_grad_out_t(_, _, _, read_grad_out_.index()),
                                               dv);
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (thread % cutlass::NumThreadsPerWarp == 0) shared_.ds_full[ds_buffer_].arrive();

      // dQ needs everyone's dS. Behind it dK is in flight until the next step has issued its
      // scores; what else a step begins and ends with hides under it.
      auto dq = Dq::accumulator();
      shared_.ds_full[ds_buffer_].wait(ds_phase_);
      Dq::template issue<sm90::Accumulate::kNo>(operands_dq, ds_buffer_, dq);
      warpgroup_wait<1>();
      release(pipeline_grad_out_, read_grad_out_);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dk, ds, operand_qt(_, _, _, read_q_.index()),
                                               dk);
      ++read_q_;
      step.advance();
      more = step.valid();
      if constexpr (Variant::kGradients > 0) {
        if (!more || step.head() != places.head) {
          captured_gradients.finish_head(params, coord, places, consumer_warp(warpgroup_));
        }
      }
      if (more) {
        shown = ask();
        await_queries();
      }
      shared_.dq_empty[warpgroup_].wait(dq_phase_ ^ 1);
      warpgroup_wait<1>();  // dQ
      Dq::write(shared_, warpgroup_, 0, thread, dq);
      dq_phase_ ^= 1;
      ds_phase_ ^= ds_buffer_;
      ds_buffer_ ^= 1;
    }
    // Only dK is in flight, whose operands are dS in registers and Q: no warp reads K or V again.
    if (thread % cutlass::NumThreadsPerWarp == 0) shared_.keys_empty.arrive();
    if constexpr (kCareful) restore_dv<Traits>(params, shared_, coord, key, column, dv);
    // The last key block's dV has left: the first dQ of this one waited for it.
    hand_out_dv(params, coord, dv);
    Dq::announce(shared_, warpgroup_, 0, thread);
    if (thread % cutlass::NumThreadsPerWarp == 0) shared_.dv_full[warpgroup_].arrive();
    warpgroup_wait<0>();
    release(pipeline_q_, read_by_dk);
    if constexpr (!kCareful) check_gradient<Traits>(params, dk);
    shared_.dq_empty[warpgroup_].wait(dq_phase_ ^ 1);
    hand_out_dk(params, coord, dk);
    Dq::announce(shared_, warpgroup_, 0, thread);
    dq_phase_ ^= 1;
  }

 private:
  /// dK and dV of keys that no query sees: nothing is loaded and no dQ leaves. The memory of dV is
  /// free with that of dQ, through which dK of the last key block has left, behind its dV.
  template <class Params>
  CUTLASS_DEVICE void hand_out_zeros(Params const& params, KeyBlock const& coord) {
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    shared_.dq_empty[warpgroup_].wait(dq_phase_ ^ 1);
    auto dv = Epilogue::template new_gradient<Traits::kHeadDimV>();
    auto dk = Epilogue::template new_gradient<Traits::kHeadDim>();
    hand_out_dv(params, coord, dv);
    hand_out_dk(params, coord, dk);
    Dq::announce(shared_, warpgroup_, 0, thread);
    if (thread % cutlass::NumThreadsPerWarp == 0) shared_.dv_full[warpgroup_].arrive();
    dq_phase_ ^= 1;
  }

  template <class Params, class Accumulator>
  CUTLASS_DEVICE void hand_out_dv(Params const& params, KeyBlock const& coord, Accumulator& dv) {
    Epilogue::template hand_out<Traits::kHeadDimV>(params, params.grad_v, params.head_dim_v, coord,
                                                   warpgroup_, shared_.own.dv[warpgroup_], dv);
  }
  template <class Params, class Accumulator>
  CUTLASS_DEVICE void hand_out_dk(Params const& params, KeyBlock const& coord, Accumulator& dk) {
    Epilogue::template hand_out<Traits::kHeadDim>(
        params, params.grad_k, params.head_dim, coord, warpgroup_,
        reinterpret_cast<Element*>(shared_.own.dq[warpgroup_]), dk, params.softmax_scale);
  }

  /// One arrival a warp: a warp's own WGMMA wait says nothing of the other warps' reads.
  CUTLASS_DEVICE static void release(Pipeline& pipeline, PipelineState& state) {
    if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) pipeline.consumer_release(state);
    ++state;
  }

  SharedStorage& shared_;
  Pipeline& pipeline_q_;
  Pipeline& pipeline_grad_out_;
  int const warpgroup_;
  // Where the barriers are, over all key blocks of the CTA.
  PipelineState read_q_, read_grad_out_;
  uint32_t keys_phase_ = 0;
  int ds_buffer_ = 0;
  uint32_t ds_phase_ = 0;
  uint32_t dq_phase_ = 0;
};

}  // namespace cute_kernels::attention
