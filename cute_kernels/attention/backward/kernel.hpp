#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/fast_math.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/ahead_mainloop.hpp"
#include "cute_kernels/attention/backward/clear.hpp"
#include "cute_kernels/attention/backward/load.hpp"
#include "cute_kernels/attention/backward/mainloop.hpp"
#include "cute_kernels/attention/backward/send.hpp"
#include "cute_kernels/attention/backward/split_mainloop.hpp"
#include "cute_kernels/attention/backward/traits.hpp"
#include "cute_kernels/attention/backward/workspace.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"

namespace cute_kernels::attention {

/// What the main backward kernel is told at run time. Tensors are (seqlen, head_dim, heads, batch)
/// to TMA.
template <class Traits, class TmaQ, class TmaGradOut, class TmaK, class TmaV, class TmaDk,
          class TmaDv>
struct BackwardParams {
  using DenseShape = cute::Shape<int, int, int, int>;
  using Shape =
      std::conditional_t<Traits::kAnyCall, cute::Shape<int, int, int, int, int>, DenseShape>;
  TmaQ tma_q;
  TmaGradOut tma_grad_out;
  TmaK tma_k;
  TmaV tma_v;
  TmaDk tma_dk;
  TmaDv tma_dv;
  Shape shape_q;
  Shape shape_k;
  TensorView grad_out;
  bool float_grads;  // dK and dV go to these, or by TMA in the inputs' type
  TensorView grad_k;
  TensorView grad_v;
  BackwardWorkspace workspace;
  uint64_t call_number;
  float scale_log2;
  float softmax_scale;
  int heads;
  int heads_per_kv;
  bool dq_in_order;   // deterministic mode, or faster so (adds_in_order)
  bool clears_ahead;  // dQ, of all groups of heads but the first (clear.hpp)
  typename Traits::Masks masks;
  int clusters;  // of CTAs, for one KV head of one batch entry, or of all packed sequences
  int pairs;     // of batch entries and KV heads
  int group;     // how many of them are worked on together
  cutlass::FastDivmod heads_kv;
  int first_number;  // of the key blocks, where a call is launched in parts
  int head_dim;
  int head_dim_v;
  typename Traits::Variant::Arguments variant;
};

/// All threads of the cluster, whose barriers are ready, or whose memory no one needs any more.
template <class Traits>
CUTLASS_DEVICE void meet() {
  if constexpr (Traits::kCluster == 1) {
    __syncthreads();
  } else {
    __syncwarp();
    cute::cluster_sync();
  }
}

/// Careful about what masks hide (hidden.hpp), it does the work of the kernel before it again, in a
/// call that has raised the alarm, and nothing in others: one kernel would not have the registers
/// for both loops.
///
/// Warpgroup 0 moves data (warp 0 loads, warp 1 + i sends what consumer warpgroup i hands out, warp
/// 3, where dQ is in order, lets others add to it, else it clears dQ of the next heads), the others
/// compute.
template <class Traits, bool kCareful, class Params>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(CUTE_GRID_CONSTANT Params const params) {
  using namespace cute;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;

  if constexpr (kCareful) {
    sm90::wait_for_previous_kernel();
    if (*params.workspace.alarm != params.call_number) return;
  }
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);

  int const warpgroup = cutlass::canonical_warp_group_idx();
  int const warp_in_group = cutlass::canonical_warp_idx_sync() % cutlass::NumWarpsPerWarpGroup;
  bool const is_producer = warpgroup == 0;

  if (threadIdx.x < Traits::kConsumerWarps) {
    shared.spoilt_keys[threadIdx.x] = 0;
    shared.queries_cleared[threadIdx.x] = false;
  }
  if (threadIdx.x == 0) {
    prefetch_tma_descriptor(params.tma_q.get_tma_descriptor());
    prefetch_tma_descriptor(params.tma_grad_out.get_tma_descriptor());
    prefetch_tma_descriptor(params.tma_k.get_tma_descriptor());
    prefetch_tma_descriptor(params.tma_v.get_tma_descriptor());
    prefetch_tma_descriptor(params.tma_dk.get_tma_descriptor());
    prefetch_tma_descriptor(params.tma_dv.get_tma_descriptor());
    shared.k_full.init(1);
    shared.v_full.init(1);
    shared.keys_empty.init(Traits::kConsumerWarps);
    shared.number_full.init(1);
    bool const last_warp_reads = params.dq_in_order || params.clears_ahead;
    shared.number_empty.init(Traits::kConsumerWarps + Traits::kConsumers + last_warp_reads);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) shared.ds_full[i].init(Traits::kDsWriters);
    shared.p_full.init(cutlass::NumWarpsPerWarpGroup);
    shared.peer_k_full.init(1);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kDsSteps; ++i) {
      shared.peer_ds_full[i].init(1);
      shared.ds_empty[i].init(Traits::kConsumerWarps * Traits::kCluster);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kConsumers; ++i) {
      CUTLASS_PRAGMA_UNROLL
      for (int buffer = 0; buffer < Traits::kDqBuffers; ++buffer) {
        shared.dq_full[i][buffer].init(cutlass::NumWarpsPerWarpGroup);
      }
      shared.dq_empty[i].init(1);
      shared.dv_full[i].init(cutlass::NumWarpsPerWarpGroup);
      shared.dq_added[i] = 0;
    }
  }
  typename Pipeline::Params pipeline_params;
  pipeline_params.role =
      is_producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  pipeline_params.is_leader = is_producer;
  // Split by products, dQ takes the stages' memory only in order.
  bool const dq_through_memory = !Traits::kSplitProducts || params.dq_in_order;
  pipeline_params.num_consumers =
      dq_through_memory ? Traits::kStageReleases : cutlass::NumWarpsPerWarpGroup;
  pipeline_params.transaction_bytes = Traits::kBytesQ + sizeof(typename Traits::Statistics);
  Pipeline pipeline_q(shared.pipeline_q, pipeline_params);
  pipeline_params.transaction_bytes = Traits::kBytesGradOut;
  Pipeline pipeline_grad_out(shared.pipeline_grad_out, pipeline_params);
  cutlass::arch::fence_barrier_init();
  meet<Traits>();

  sm90::let_next_kernel_start();
  int const number = draw_key_block<Traits>(params, shared);
  if constexpr (Traits::kAnyCall && !Traits::kPersistent) {
    if (!find_only_key_block<Traits>(params, shared, number)) {
      sm90::wait_for_previous_kernel();  // so does every CTA, for the kernel behind this one
      return;
    }
  }

  if (is_producer) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp_in_group == 0) {
      if (elect_one_sync()) {
        BackwardLoader<Traits, Params> loader(params, shared, pipeline_q, pipeline_grad_out);
        hand_out_key_blocks<Traits>(params, shared, number,
                                    [&](auto const& coord) { loader.load(coord); });
      }
    } else if (warp_in_group <= Traits::kConsumers && dq_through_memory) {
      int const consumer = warp_in_group - 1;
      sm90::wait_for_previous_kernel();  // it clears dQ
      if (elect_one_sync()) {
        PipelineState read;
        auto release = [&] {
          if constexpr (Traits::kSplitProducts) {
            (consumer == 0 ? pipeline_grad_out : pipeline_q).consumer_release(read);
            ++read;
          } else {
            shared.dq_empty[consumer].arrive();
          }
        };
        BackwardSender<Traits, Params> sender(params, shared, consumer);
        for_each_key_block<Traits, Caller::kThread>(
            params, shared, number, [&](auto const& coord) { sender.send(coord, release); });
        sm90::bulk_wait_complete();
      }
    } else if (warp_in_group == Traits::kConsumers + 1 && params.dq_in_order) {
      if (elect_one_sync()) {
        BackwardTurns<Traits, Params> turns(params, shared);
        for_each_key_block<Traits, Caller::kThread>(params, shared, number,
                                                    [&](auto const& coord) { turns.pass(coord); });
      }
    } else if (Traits::kPersistent && !kCareful && warp_in_group == Traits::kConsumers + 1 &&
               params.clears_ahead) {
      sm90::wait_for_previous_kernel();  // it clears the counts
      for_each_key_block<Traits, Caller::kWarp>(params, shared, number, [&](auto const& coord) {
        clear_next_group<Traits>(params, coord);
      });
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    int const consumer = warpgroup - 1;
    if constexpr (Traits::kSplitProducts) {
      using Mainloop = std::conditional_t<Traits::kScoresAhead, BackwardAheadMainloop<Traits>,
                                          BackwardSplitMainloop<Traits>>;
      BackwardSplitProducts<Traits>::template compute<Mainloop, kCareful>(
          params, shared, pipeline_q, pipeline_grad_out,
          key_block<Traits>(params, shared, number, 0), consumer);
    } else {
      if constexpr (Traits::kSharesMask) sm90::wait_for_previous_kernel();  // it asks hooks
      BackwardMainloop<Traits> mainloop(shared, pipeline_q, pipeline_grad_out, consumer);
      for_each_key_block<Traits, Caller::kWarp>(params, shared, number, [&](auto const& coord) {
        mainloop.template compute<kCareful>(params, coord);
      });
    }
  }
  if constexpr (Traits::kCluster > 1) meet<Traits>();
}

}  // namespace cute_kernels::attention
