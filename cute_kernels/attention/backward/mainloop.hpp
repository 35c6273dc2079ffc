#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/workspace.hpp"
#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/sm90/bulk_reduce.hpp"
#include "cute_kernels/sm90/math.hpp"
#include "cute_kernels/sm90/semaphore.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// The work of one CTA: kTileN keys of one KV head of one batch entry, and the query heads and
/// blocks that see them.
struct KeyBlockCoord {
  int n_block;
  int kv_head;
  int batch;
};

/// Loads, products and dQ's way out for one block of keys (FlashAttention-2, arXiv 2307.08691,
/// algorithm 2, with FlashAttention-3's warp roles).
///
/// Who waits for whom:
/// - k_full, v_full, and full of the q and grad_out pipelines: consumers wait for the producer's
///   TMA. Empty: the producer waits for every consumer warp.
/// - ds_full[b]: dQ's product waits until every consumer warp has written its part of dS.
/// - dq_full[i]: the warp that adds dQ of warpgroup i waits for the four warps of i. dq_empty[i]:
///   these wait until TMA has read their last slice.
/// - turns (deterministic): that warp waits for the same slice of the key blocks before.
template <class Traits>
class BackwardMainloop {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;

  static constexpr int kTileM = Traits::kTileM;
  static constexpr int kTileN = Traits::kTileN;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kConsumers = Traits::kConsumers;

 public:
  /// Calls step(head, block, masked) for every query block of every query head, in the one order
  /// that all warps keep.
  template <class Params, class Step>
  CUTLASS_DEVICE static void for_each_step(Params const& params, KeyBlockCoord const& coord,
                                           Step step) {
    QueryRange const range = params.mask.query_blocks(coord.n_block * kTileN, kTileN, kTileM);
    int const first_head = coord.kv_head * params.heads_per_kv;
    for (int head = first_head; head < first_head + params.heads_per_kv; ++head) {
      for (int block = range.first; block < params.workspace.m_blocks; ++block) {
        step(head, block, block < range.full);
      }
    }
  }

  /// Issues every load of the CTA. Called by one thread.
  template <class Params>
  CUTLASS_DEVICE static void load(Params const& params, SharedStorage& shared, Pipeline& pipeline_q,
                                  Pipeline& pipeline_grad_out, KeyBlockCoord const& coord) {
    using namespace cute;
    auto load_keys = [&](auto const& tma, auto const& shape, auto& buffer, auto& full) {
      auto keys = local_tile(tma.get_tma_tensor(shape)(_, _, coord.kv_head, coord.batch),
                             Shape<Int<kTileN>, Int<kHeadDim>>{}, make_coord(coord.n_block, _0{}));
      auto tile = make_tensor(make_smem_ptr(buffer.data()), typename Traits::LayoutK{});
      auto [from, to] =
          tma_partition(tma, _0{}, Layout<_1>{}, group_modes<0, 2>(tile), group_modes<0, 2>(keys));
      full.arrive_and_expect_tx(Traits::kBytesK);
      copy(tma.with(reinterpret_cast<uint64_t&>(full)), from, to);
    };
    auto stages_q = make_tensor(make_smem_ptr(shared.q.data()), typename Traits::LayoutQ{});
    auto stages_grad_out =
        make_tensor(make_smem_ptr(shared.grad_out.data()), typename Traits::LayoutQ{});
    PipelineState write_q = cutlass::make_producer_start_state<Pipeline>();
    PipelineState write_grad_out = cutlass::make_producer_start_state<Pipeline>();
    auto load_queries = [&](auto const& tma, auto const& shape, auto& stages, float const* rows,
                            float (&row_stages)[Traits::kStages][kTileM], Pipeline& pipeline,
                            PipelineState& write, int head, int block) {
      auto queries = local_tile(tma.get_tma_tensor(shape)(_, _, head, coord.batch),
                                Shape<Int<kTileM>, Int<kHeadDim>>{}, make_coord(block, _0{}));
      auto [from, to] = tma_partition(tma, _0{}, Layout<_1>{}, group_modes<0, 2>(stages),
                                      group_modes<0, 2>(queries));
      pipeline.producer_acquire(write);
      auto* full = pipeline.producer_get_barrier(write);
      copy(tma.with(*full), from, to(_, write.index()));
      SM90_BULK_COPY_G2S::copy(rows + block_index(params, head, coord.batch, block) * kTileM, full,
                               row_stages[write.index()], Traits::kBytesRows);
      ++write;
    };

    load_keys(params.tma_k, params.shape_k, shared.k, shared.k_full);
    bool first = true;
    for_each_step(params, coord, [&](int head, int block, bool) {
      load_queries(params.tma_q, params.shape_q, stages_q, params.workspace.lse_log2,
                   shared.lse_log2, pipeline_q, write_q, head, block);
      if (first) load_keys(params.tma_v, params.shape_k, shared.v, shared.v_full);
      first = false;
      load_queries(params.tma_grad_out, params.shape_q, stages_grad_out, params.workspace.delta,
                   shared.delta, pipeline_grad_out, write_grad_out, head, block);
    });
  }

  /// Adds the dQ slices of one warpgroup to global memory. Called by one thread.
  template <class Params>
  CUTLASS_DEVICE static void add_dq(Params const& params, SharedStorage& shared,
                                    KeyBlockCoord const& coord, int warpgroup) {
    uint32_t phase = 0;
    for_each_step(params, coord, [&](int head, int block, bool) {
      int64_t const slice = block_index(params, head, coord.batch, block) * kConsumers + warpgroup;
      shared.dq_full[warpgroup].wait(phase);
      phase ^= 1;
      if (params.deterministic) {
        sm90::semaphore_wait(params.workspace.turns + slice, coord.n_block);
      }
      sm90::bulk_reduce_add(params.workspace.dq + slice * Traits::kSliceFloats,
                            shared.dq[warpgroup], Traits::kSliceFloats * sizeof(float));
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
      shared.dq_empty[warpgroup].arrive();
      if (params.deterministic) {
        sm90::bulk_wait_complete();
        sm90::semaphore_advance(params.workspace.turns + slice);
      }
    });
    sm90::bulk_wait_complete();
  }

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
    typename Traits::MmaDq mma_dq;
    auto slice_scores = mma_scores.get_thread_slice(thread);
    auto slice_dkv = mma_dkv.get_thread_slice(thread);
    auto slice_dq = mma_dq.get_thread_slice(thread);

    auto tensor = [](auto& buffer, auto layout) {
      return make_tensor(make_smem_ptr(buffer.data()), layout);
    };
    auto own_keys = [&](auto& buffer) {
      return local_tile(tensor(buffer, typename Traits::LayoutK{}),
                        Shape<Int<Traits::kWarpgroupN>, Int<kHeadDim>>{},
                        make_coord(warpgroup, _0{}));
    };
    auto operand_k = slice_scores.make_fragment_A(slice_scores.partition_A(own_keys(shared.k)));
    auto operand_v = slice_scores.make_fragment_A(slice_scores.partition_A(own_keys(shared.v)));
    auto operand_q = slice_scores.make_fragment_B(
        slice_scores.partition_B(tensor(shared.q, typename Traits::LayoutQ{})));
    auto operand_grad_out = slice_scores.make_fragment_B(
        slice_scores.partition_B(tensor(shared.grad_out, typename Traits::LayoutQ{})));
    auto operand_qt = slice_dkv.make_fragment_B(
        slice_dkv.partition_B(tensor(shared.q, typename Traits::LayoutQt{})));
    auto operand_grad_out_t = slice_dkv.make_fragment_B(
        slice_dkv.partition_B(tensor(shared.grad_out, typename Traits::LayoutQt{})));
    // A of dQ = dS K, or of dQ^T = K^T dS^T, is the warpgroup's slice; B is whole.
    auto const [operand_dq_a, operand_dq_b] = [&] {
      auto ds = tensor(shared.ds, typename Traits::LayoutDs{});
      auto kt = tensor(shared.k, typename Traits::LayoutKt{});
      if constexpr (Traits::kSplitQueries) {
        auto own =
            local_tile(ds, Shape<Int<Traits::kSliceM>, Int<kTileN>>{}, make_coord(warpgroup, _0{}));
        return cute::make_tuple(slice_dq.make_fragment_A(slice_dq.partition_A(own)),
                                slice_dq.make_fragment_B(slice_dq.partition_B(kt)));
      } else {
        auto own =
            local_tile(kt, Shape<Int<Traits::kSliceM>, Int<kTileN>>{}, make_coord(warpgroup, _0{}));
        return cute::make_tuple(slice_dq.make_fragment_A(slice_dq.partition_A(own)),
                                slice_dq.make_fragment_B(slice_dq.partition_B(ds)));
      }
    }();

    auto new_scores = [&] {
      return partition_fragment_C(mma_scores, Shape<Int<Traits::kWarpgroupN>, Int<kTileM>>{});
    };
    using OperandLayout = decltype(sm90::accumulator_as_operand_a(new_scores().layout()));

    auto store_ds = make_tiled_copy_C(Copy_Atom<SM90_U16x8_STSM_T, Element>{}, mma_scores);
    auto slice_ds = store_ds.get_thread_slice(thread);
    auto written_ds = slice_ds.partition_D(
        local_tile(tensor(shared.ds, typename Traits::LayoutDst{}),
                   Shape<Int<Traits::kWarpgroupN>, Int<kTileM>>{}, make_coord(warpgroup, _0{})));

    int const key = coord.n_block * kTileN + warpgroup * Traits::kWarpgroupN + thread / 32 * 16 +
                    thread % 32 / 4;
    int const column = thread % 4 * 2;
    bool const leads_warp = threadIdx.x % cutlass::NumThreadsPerWarp == 0;

    PipelineState read_q, read_grad_out;
    int buffer = 0;
    uint32_t ds_phase = 0;
    uint32_t dq_phase = 0;

    shared.k_full.wait(0);
    bool v_pending = true;
    for_each_step(params, coord, [&](int, int block, bool masked) {
      // S^T and dP^T, back to back.
      auto scores = new_scores();
      auto grads = new_scores();
      pipeline_q.consumer_wait(read_q);
      sm90::issue_gemm<sm90::Accumulate::kNo>(mma_scores, operand_k,
                                              operand_q(_, _, _, read_q.index()), scores);
      if (v_pending) shared.v_full.wait(0);
      v_pending = false;
      pipeline_grad_out.consumer_wait(read_grad_out);
      sm90::issue_gemm<sm90::Accumulate::kNo>(
          mma_scores, operand_v, operand_grad_out(_, _, _, read_grad_out.index()), grads);

      // P^T = 2^(scale S^T - lse), while dP^T is in flight.
      auto const* lse_log2 = shared.lse_log2[read_q.index()] + column;
      auto const* delta = shared.delta[read_grad_out.index()] + column;
      auto p_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
      warpgroup_wait<1>();
      if (masked) params.mask.apply_transposed(p_rows, key, block * kTileM + column);
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(p_rows); col += 2) {
        float2 const lse = *reinterpret_cast<float2 const*>(lse_log2 + col * 4);
        CUTLASS_PRAGMA_UNROLL
        for (int row = 0; row < size<0>(p_rows); ++row) {
          p_rows(row, col) = sm90::exp2_mufu(p_rows(row, col) * params.scale_log2 - lse.x);
          p_rows(row, col + 1) = sm90::exp2_mufu(p_rows(row, col + 1) * params.scale_log2 - lse.y);
        }
      }
      auto p = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(scores.data(), OperandLayout{}), p);

      // dS^T = P^T (dP^T - delta).
      warpgroup_wait<0>();
      sm90::issue_gemm<sm90::Accumulate::kYes>(
          mma_dkv, p, operand_grad_out_t(_, _, _, read_grad_out.index()), dv);
      auto ds_rows = make_tensor(grads.data(), sm90::accumulator_rows_cols(grads.layout()));
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(ds_rows); col += 2) {
        float2 const shift = *reinterpret_cast<float2 const*>(delta + col * 4);
        CUTLASS_PRAGMA_UNROLL
        for (int row = 0; row < size<0>(ds_rows); ++row) {
          ds_rows(row, col) = p_rows(row, col) * (ds_rows(row, col) - shift.x);
          ds_rows(row, col + 1) = p_rows(row, col + 1) * (ds_rows(row, col + 1) - shift.y);
        }
      }
      auto ds = make_tensor<Element>(OperandLayout{});
      sm90::convert_fragment<Element>(make_tensor(grads.data(), OperandLayout{}), ds);
      auto ds_fragment = make_tensor(ds.data(), grads.layout());
      copy(store_ds, slice_ds.retile_S(ds_fragment), written_ds(_, _, _, buffer));
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (leads_warp) shared.ds_full[buffer].arrive();

      // dK needs only this warpgroup's dS; dQ needs everyone's.
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_dkv, ds, operand_qt(_, _, _, read_q.index()),
                                               dk);
      shared.ds_full[buffer].wait(ds_phase);
      auto dq = partition_fragment_C(mma_dq, Shape<Int<Traits::kSliceM>, Int<Traits::kSliceN>>{});
      if constexpr (Traits::kSplitQueries) {
        sm90::issue_gemm<sm90::Accumulate::kNo>(mma_dq, operand_dq_a(_, _, _, buffer), operand_dq_b,
                                                dq);
      } else {
        sm90::issue_gemm<sm90::Accumulate::kNo>(mma_dq, operand_dq_a, operand_dq_b(_, _, _, buffer),
                                                dq);
      }
      warpgroup_wait<1>();  // dV, dK
      release(pipeline_grad_out, read_grad_out);
      release(pipeline_q, read_q);
      shared.dq_empty[warpgroup].wait(dq_phase ^ 1);
      warpgroup_wait<0>();
      auto* staging = reinterpret_cast<float4*>(shared.dq[warpgroup]) + thread;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(dq) / 4; ++i) {
        staging[i * 128] = make_float4(dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
      }
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (leads_warp) shared.dq_full[warpgroup].arrive();

      dq_phase ^= 1;
      ds_phase ^= buffer;
      buffer ^= 1;
    });
  }

 private:
  template <class Params>
  CUTLASS_DEVICE static int64_t block_index(Params const& params, int head, int batch, int block) {
    return (static_cast<int64_t>(batch) * params.heads + head) * params.workspace.m_blocks + block;
  }

  /// One arrival a warp: a warp's own WGMMA wait says nothing of the other warps' reads.
  CUTLASS_DEVICE static void release(Pipeline& pipeline, PipelineState& state) {
    if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) pipeline.consumer_release(state);
    ++state;
  }
};

}  // namespace cute_kernels::attention
