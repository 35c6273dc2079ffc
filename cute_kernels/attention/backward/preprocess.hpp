#pragma once

#include <cutlass/numeric_conversion.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/sinks.hpp"
#include "cute_kernels/attention/backward/workspace.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"

namespace cute_kernels::attention {

inline constexpr int kPreprocessThreads = 256;

template <class Traits>
struct PreprocessParams {
  TensorView q;
  TensorView out;
  TensorView grad_out;
  float const* lse;
  float const* grad_lse;
  float const* sinks;
  int seqlen_q;  // rows of a batch entry, or of all packed sequences
  cutlass::FastDivmod heads;
  int head_dim;
  int head_dim_v;
  float unit_of_lse;
  int rows_to_clear;  // of heads: those of the others' dQ the main kernel clears (clear.hpp)
  uint64_t call_number;
  BackwardWorkspace workspace;
  typename Traits::CallOfSequences call;
};

/// Of all threads of a CTA.
CUTLASS_DEVICE bool has_reversed_sequence(AttentionCall const& call) {
  bool found = false;
  if (call.is_packed()) {
    for (int i = threadIdx.x; i < call.sizes.batch; i += kPreprocessThreads) {
      found |= is_reversed(call.packed, i);
    }
  }
  return __syncthreads_or(found);
}

/// One CTA for each query block of a head of a batch entry: the statistics of kTileM queries, of
/// which delta = rowsum(dO * O) - grad_lse, and zeros where the main kernel counts and adds up dQ;
/// in order, where the first to come writes dQ, only where it counts.
template <class Traits>
__global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_kernel(CUTE_GRID_CONSTANT PreprocessParams<Traits> const params) {
  using Element = typename Traits::Element;
  constexpr int kVector = 8;  // elements of 16 bytes
  constexpr int kLanes = lanes_of_row(Traits::kHeadDimV / kVector);
  constexpr int kRows = kPreprocessThreads / kLanes;
  using Vector = cutlass::AlignedArray<Element, kVector>;

  sm90::let_next_kernel_start();
  // From the last block to the first: what the main kernel begins with is still in L2.
  int64_t const block_index = gridDim.x - 1 - blockIdx.x;
  int block, head, batch;
  int const row_of_heads = params.workspace.m_blocks.divmod(block, static_cast<int>(block_index));
  params.heads(batch, head, row_of_heads);
  Slot const slot = [&] {
    if constexpr (Traits::kAnyCall) {
      return slot_of_queries(params.call, block, Traits::kTileM);
    } else {
      return Slot{0, params.seqlen_q, params.seqlen_q};
    }
  }();
  auto* const statistics =
      static_cast<typename Traits::Statistics*>(params.workspace.statistics) + block_index;
  bool alarming = false;
  bool sees_nothing = false;  // perhaps, one of the thread's rows
  float const sink = params.sinks == nullptr ? -INFINITY : params.sinks[head];
  float sink_gradient = 0.f;  // of the thread's rows
  // A row without keys has the sink's lse; so may one whose keys are nothing beside the sink.
  auto may_see_nothing = [&](float lse) { return lse == -INFINITY || lse == sink; };

  int const lane = threadIdx.x % kLanes;
  int const column = lane * kVector;
  cutlass::NumericArrayConverter<float, Element, kVector> widen;
  auto row_of = [&](TensorView const& view, int query, int column) {
    return widen(*reinterpret_cast<Vector const*>(
        static_cast<Element const*>(view.data) + batch * view.batch_stride +
        (slot.first + query) * view.seqlen_stride + head * view.head_stride + column));
  };
  auto of_row = [&](int query) {  // in lse and grad_lse
    return static_cast<int64_t>(row_of_heads) * params.seqlen_q + slot.first + query;
  };
  CUTLASS_PRAGMA_UNROLL
  for (int base = 0; base < Traits::kTileM; base += kRows) {
    int const row = base + threadIdx.x / kLanes;
    int const query = block * Traits::kTileM + row;
    bool const inside = query < slot.used && row < Traits::kTileM;
    float sum = 0.f;
    if (inside && column < params.head_dim_v) {
      auto const out = row_of(params.out, query, column);
      auto const grad_out = row_of(params.grad_out, query, column);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kVector; ++i) sum += out[i] * grad_out[i];
    }
    CUTLASS_PRAGMA_UNROLL
    for (int step = kLanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, step);
    }
    if (lane == 0 && row < Traits::kTileM) {
      float lse = -INFINITY;
      float minus_delta = 0.f;
      if (inside) {
        int64_t const at = of_row(query);
        lse = params.lse[at];
        minus_delta = (params.grad_lse == nullptr ? 0.f : params.grad_lse[at]) - sum;
        alarming |= is_alarming(lse, minus_delta);
        sees_nothing |= may_see_nothing(lse);
        sink_gradient += gradient_of_sink(sink, lse, minus_delta);
      }
      statistics->set(row, lse, minus_delta, params.unit_of_lse);
    }
  }
  if (__any_sync(0xffffffff, sees_nothing)) {  // a row's lanes are those of one warp
    CUTLASS_PRAGMA_NO_UNROLL
    for (int row = threadIdx.x / kLanes; row < Traits::kTileM; row += kRows) {
      int const query = block * Traits::kTileM + row;
      if (query >= slot.used || !may_see_nothing(params.lse[of_row(query)])) continue;
      auto has_wild = [&](TensorView const& view, int columns) {
        bool wild = false;
        CUTLASS_PRAGMA_NO_UNROLL
        for (int at = column; at < columns; at += kLanes * kVector) {
          wild |= !are_tame(row_of(view, query, at));
        }
        return wild;
      };
      alarming |= has_wild(params.q, params.head_dim);
      alarming |= has_wild(params.grad_out, params.head_dim_v);
    }
  }
  if (params.sinks != nullptr) {
    float const of_block = sum_of_cta<kPreprocessThreads>(sink_gradient);
    if (threadIdx.x == 0) params.workspace.sinks[block_index] = of_block;
  }
  if (alarming) *params.workspace.alarm = params.call_number;
  if constexpr (Traits::kSharesMask) {
    sm90::wait_for_previous_kernel();  // the main kernel waits for this one, and so for both
  }
  int first_number = 0;
  if constexpr (Traits::kAnyCall) {
    if (blockIdx.x == 0 && has_reversed_sequence(params.call)) first_number = kNoMoreKeyBlocks;
  }
  if (blockIdx.x + threadIdx.x == 0) {
    *params.workspace.drawn = *params.workspace.careful_drawn = first_number;
  }
  if (threadIdx.x < Traits::kCluster) {
    int64_t const at = block_index * Traits::kCluster + threadIdx.x;
    params.workspace.careful_turns[at] = 0;
    if (params.workspace.turns != nullptr) params.workspace.turns[at] = 0;
  }
  if (threadIdx.x == 0 && block_index % params.workspace.m_blocks.divisor == 0) {
    params.workspace.cleared[row_of_heads] = 0;
  }
  if (params.workspace.turns != nullptr || row_of_heads >= params.rows_to_clear) return;
  constexpr int kFloat4s = Traits::kTileM * Traits::kHeadDim / 4;
  auto* dq = reinterpret_cast<float4*>(params.workspace.dq) + block_index * kFloat4s;
  for (int i = threadIdx.x; i < kFloat4s; i += kPreprocessThreads) {
    dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

}  // namespace cute_kernels::attention
