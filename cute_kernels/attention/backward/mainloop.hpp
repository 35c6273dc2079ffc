#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/dq.hpp"
#include "cute_kernels/attention/backward/ds.hpp"
#include "cute_kernels/attention/backward/softmax.hpp"
#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// The products of one block of keys, split over the warpgroups by keys (FlashAttention-2, arXiv
/// 2307.08691, algorithm 2, with FlashAttention-3's warp roles).
///
/// Who waits for whom:
/// - k_full, v_full, and full of the q and grad_out pipelines: consumers wait for the producer's
///   TMA. Empty: the producer waits for every consumer warp.
/// - ds_full[b]: dQ's product waits until every consumer warp has written its part of dS.
/// - dq_full[i]: the thread that adds dQ of warpgroup i waits for the four warps of i. dq_empty[i]:
///   these wait until TMA has read their last slice.
/// - turns (deterministic): that thread waits for the same slice of the key blocks before.
template <class Traits>
class BackwardMainloop {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;
  using Dq = BackwardDq<Traits>;
  using Ds = BackwardDs<Traits>;

  using OperandLayout = typename Traits::ScoresAsOperand;

  static constexpr int kTileM = Traits::kTileM;
  // Whether dP's accumulators start from -delta.
  static constexpr auto kStartFromDelta =
      Traits::kShuffledStatistics ? sm90::Accumulate::kNo : sm90::Accumulate::kYes;

 public:
  /// Adds up dK (not yet scaled) and dV of a warpgroup's 64 keys, and hands out dQ.
  template <class Params, class Accumulator>
  CUTLASS_DEVICE static void compute(Params const& params, SharedStorage& shared,
                                     Pipeline& pipeline_q, Pipeline& pipeline_grad_out,
                                     KeyBlockCoord const& coord, int warpgroup, Accumulator& dk,
                                     Accumulator& dv) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    typename Traits::MmaScores mma_scores;
    typename Traits::MmaDkv mma_dkv;
    auto slice_scores = mma_scores.get_thread_slice(thread);
    auto slice_dkv = mma_dkv.get_thread_slice(thread);

    auto tensor = [](auto& buffer, auto layout) {
      return make_tensor(make_smem_ptr(buffer.data()), layout);
    };
    auto own_keys = [&](auto& buffer) {
      return local_tile(tensor(buffer, typename Traits::LayoutK{}),
                        Shape<Int<Traits::kWarpgroupN>, Int<Traits::kHeadDim>>{},
                        make_coord(warpgroup, _0{}));
    };
    typename Traits::MmaKq mma_kq;
    auto operand_k = keys_operand(mma_kq, own_keys(shared.k), thread);
    auto operand_v = keys_operand(mma_scores, own_keys(shared.v), thread);
    auto operand_q = slice_scores.make_fragment_B(
        slice_scores.partition_B(tensor(shared.q, typename Traits::LayoutQ{})));
    auto operand_grad_out = slice_scores.make_fragment_B(
        slice_scores.partition_B(tensor(shared.grad_out, typename Traits::LayoutQ{})));
    auto operand_qt = slice_dkv.make_fragment_B(
        slice_dkv.partition_B(tensor(shared.q, typename Traits::LayoutQt{})));
    auto operand_grad_out_t = slice_dkv.make_fragment_B(
        slice_dkv.partition_B(tensor(shared.grad_out, typename Traits::LayoutQt{})));
    auto operands_dq =
        Dq::operands(shared, shared.k, typename Traits::LayoutKt{}, warpgroup, thread);

    auto new_scores = [&] {
      return partition_fragment_C(mma_scores, Shape<Int<Traits::kWarpgroupN>, Int<kTileM>>{});
    };

    Element* const own_ds = Ds::own_part(shared, warpgroup, thread);

    int const key = coord.n_block * Traits::kTileN + warpgroup * Traits::kWarpgroupN +
                    thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;

    PipelineState read_q, read_grad_out;
    PipelineState read_by_dk;  // the Q of the product that is still in flight when a step ends
    bool first_step = true;
    int buffer = 0;
    uint32_t ds_phase = 0;
    uint32_t dq_phase = 0;

    typename Traits::Statistic lse_log2, minus_delta;
    auto load_statistics = [&] {
      pipeline_q.consumer_wait(read_q);
      lse_log2.load(shared.lse_log2[read_q.index()], thread);
      pipeline_grad_out.consumer_wait(read_grad_out);
      minus_delta.load(shared.minus_delta[read_grad_out.index()], thread);
    };
    // The last step's dK is complete when no more than `in_flight` products are not.
    auto finish_last_step = [&](auto in_flight) {
      warpgroup_wait<in_flight>();
      if (!first_step) release(pipeline_q, read_by_dk);
    };

    shared.k_full.wait(0);
    shared.v_full.wait(0);
    if constexpr (Traits::kKeysInRegisters) {
      auto load = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma_kq);
      auto slice = load.get_thread_slice(thread);
      auto keys = as_position_independent_swizzle_tensor(own_keys(shared.k));
      copy(load, slice.partition_S(keys), slice.retile_D(operand_k));
    }
    load_statistics();
    QuerySteps<Traits, Params> step(params, coord);
    for (bool more = step.valid(); more;) {
      // S^T and dP^T, back to back.
      auto scores = new_scores();
      auto gradients = new_scores();
      auto p_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
      auto ds_rows = make_tensor(gradients.data(), p_rows.layout());
      if constexpr (!Traits::kScoresBehindDk) finish_last_step(_0{});
      if constexpr (!Traits::kShuffledStatistics) {
        start_from(ds_rows, minus_delta);
        warpgroup_fence_operand(gradients);
      }
      sm90::issue_gemm<sm90::Accumulate::kNo>(mma_kq, operand_k, operand_q(_, _, _, read_q.index()),
                                              scores);
      if constexpr (Traits::kScoresBehindDk) finish_last_step(_1{});
      sm90::issue_gemm<kStartFromDelta>(
          mma_scores, operand_v, operand_grad_out(_, _, _, read_grad_out.index()), gradients);
      if (!first_step) Dq::announce(shared, warpgroup, 0, thread);
      first_step = false;

      warpgroup_wait<1>();
      if (step.masked()) {
        params.mask.apply_transposed(p_rows, key, step.block() * kTileM + column);
      }
      scores_to_probabilities(p_rows, lse_log2, params.scale_log2);
      warpgroup_wait<0>();
      if constexpr (Traits::kShuffledStatistics) subtract_delta(ds_rows, minus_delta);
      gradients_of_scores(gradients, scores);
      auto p = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(scores.data(), OperandLayout{}), p);
      auto ds = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(gradients.data(), OperandLayout{}), ds);
      Ds::store(ds, own_ds, buffer);

      // dS becomes visible to everyone while dV is in flight.
      sm90::issue_gemm<sm90::Accumulate::kYes>(
          mma_dkv, p, operand_grad_out_t(_, _, _, read_grad_out.index()), dv);
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (thread % cutlass::NumThreadsPerWarp == 0) shared.ds_full[buffer].arrive();

      // dQ needs everyone's dS. Behind it dK is in flight until the next step has issued its
      // scores; what else a step begins and ends with hides under it.
      auto dq = Dq::accumulator();
      shared.ds_full[buffer].wait(ds_phase);
      Dq::template issue<sm90::Accumulate::kNo>(operands_dq, buffer, dq);
      warpgroup_wait<1>();  // dV
      release(pipeline_grad_out, read_grad_out);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dkv, ds, operand_qt(_, _, _, read_q.index()),
                                               dk);
      ++read_q;
      step.advance();
      more = step.valid();
      if (more) load_statistics();
      shared.dq_empty[warpgroup].wait(dq_phase ^ 1);
      warpgroup_wait<1>();  // dQ
      Dq::write(shared, warpgroup, 0, thread, dq);

      dq_phase ^= 1;
      ds_phase ^= buffer;
      buffer ^= 1;
    }
    Dq::announce(shared, warpgroup, 0, thread);
    warpgroup_wait<0>();
  }

 private:
  /// A of S^T or dP^T: a descriptor, or registers still to be loaded.
  template <class Mma, class Keys>
  CUTLASS_DEVICE static auto keys_operand(Mma const& mma, Keys const& keys, int thread) {
    auto slice = mma.get_thread_slice(thread);
    return slice.make_fragment_A(slice.partition_A(keys));
  }

  /// One arrival a warp: a warp's own WGMMA wait says nothing of the other warps' reads.
  CUTLASS_DEVICE static void release(Pipeline& pipeline, PipelineState& state) {
    if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) pipeline.consumer_release(state);
    ++state;
  }
};

}  // namespace cute_kernels::attention
