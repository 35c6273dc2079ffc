#pragma once

#include <cutlass/array.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/workspace.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

template <class Traits>
struct PostprocessParams {
  TensorView grad_q;
  bool float_grads;  // grad_q is of float
  bool adds;         // to what stands there; of float only
  float softmax_scale;
  int seqlen_q;
  int head_dim;
  cutlass::FastDivmod heads;
  uint64_t call_number;
  BackwardWorkspace workspace;
  typename Traits::CallOfSequences call;
};

inline constexpr int kPostprocessPad = 8;  // elements, against bank conflicts

template <class Traits>
constexpr int postprocess_shared_bytes() {
  return Traits::kTileM * (Traits::kHeadDim + kPostprocessPad) * sizeof(typename Traits::Element);
}

/// A thread's part of a slice of dQ, in the order of the accumulators, as floats to `first_row`,
/// where the block's first row is. What is beyond `used` is 0.
template <class Traits, class Accumulator>
CUTLASS_DEVICE void store_floats(PostprocessParams<Traits> const& params, Accumulator const& dq,
                                 float* first_row, int rows, int used) {
  using namespace cute;
  constexpr bool kByQueries = Traits::kDqSplit == Traits::DqSplit::kQueries;
  int const warpgroup = threadIdx.x / 128;
  int const first_query = kByQueries ? warpgroup * Traits::kDqQueries : 0;
  int const first_channel = kByQueries ? 0 : warpgroup * Traits::kDqChannels;
  auto const places =
      typename Traits::MmaDq{}
          .get_thread_slice(threadIdx.x % 128)
          .partition_C(make_identity_tensor(Shape<Int<Traits::kSliceM>, Int<Traits::kSliceN>>{}));
  // Two that follow one another are neighbouring channels, or queries of the same channel.
  constexpr int kChannelsAtOnce = Traits::kDqTransposed ? 1 : 2;
  using Vector = cutlass::AlignedArray<float, kChannelsAtOnce>;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(dq); i += kChannelsAtOnce) {
    int const query = first_query + get<Traits::kDqTransposed ? 1 : 0>(places(i));
    int const channel = first_channel + get<Traits::kDqTransposed ? 0 : 1>(places(i));
    if (query >= (params.adds ? used : rows) || channel >= params.head_dim) continue;
    auto& to =
        *reinterpret_cast<Vector*>(first_row + query * params.grad_q.seqlen_stride + channel);
    Vector values;
    CUTLASS_PRAGMA_UNROLL
    for (int n = 0; n < kChannelsAtOnce; ++n) values[n] = query < used ? dq(i + n) : 0.f;
    if (params.adds) {
      Vector const before = to;
      CUTLASS_PRAGMA_UNROLL
      for (int n = 0; n < kChannelsAtOnce; ++n) values[n] += before[n];
    }
    to = values;
  }
}

/// One CTA for each query block of a head of a batch entry: dQ from the order of the accumulators
/// to rows, scaled and rounded. Warpgroup i reads slice i.
template <class Traits>
__global__ void __launch_bounds__(128 * Traits::kDqSlices)
    postprocess_kernel(CUTE_GRID_CONSTANT PostprocessParams<Traits> const params) {
  using namespace cute;
  using Element = typename Traits::Element;
  constexpr int kThreads = 128 * Traits::kDqSlices;
  constexpr int kVector = 8;
  constexpr int kRowElements = Traits::kHeadDim + kPostprocessPad;
  extern __shared__ char shared_memory[];
  auto* rows = reinterpret_cast<Element*>(shared_memory);

  int const warpgroup = threadIdx.x / 128;
  int const thread = threadIdx.x % 128;
  // From the last block to the first: what the main kernel has written last is still in L2.
  int const block_index = gridDim.x - 1 - blockIdx.x;
  int block, head, batch;
  params.heads(batch, head, params.workspace.m_blocks.divmod(block, block_index));
  Slot const slot = [&] {
    if constexpr (Traits::kAnyCall) {
      return slot_of_queries(params.call, block, Traits::kTileM);
    } else {
      return Slot{0, params.seqlen_q, params.seqlen_q};
    }
  }();

  sm90::wait_for_previous_kernel();
  bool const careful = *params.workspace.alarm == params.call_number;
  int const* const turns = careful ? params.workspace.careful_turns : params.workspace.turns;
  typename Traits::MmaDq mma;
  auto dq = partition_fragment_C(mma, Shape<Int<Traits::kSliceM>, Int<Traits::kSliceN>>{});
  auto const* slice = reinterpret_cast<float4 const*>(
      params.workspace.dq +
      (int64_t{block_index} * Traits::kDqSlices + warpgroup) * Traits::kSliceFloats);
  // In order, no one has written what no key sees.
  bool const seen = turns == nullptr || turns[int64_t{block_index} * Traits::kCluster] > 0;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(dq) / 4; ++i) {
    float4 const part = seen ? slice[i * 128 + thread] : make_float4(0.f, 0.f, 0.f, 0.f);
    dq(4 * i) = part.x * params.softmax_scale;
    dq(4 * i + 1) = part.y * params.softmax_scale;
    dq(4 * i + 2) = part.z * params.softmax_scale;
    dq(4 * i + 3) = part.w * params.softmax_scale;
  }
  if (params.float_grads) {
    int const first = block * Traits::kTileM;
    auto* const row = static_cast<float*>(params.grad_q.data) + batch * params.grad_q.batch_stride +
                      head * params.grad_q.head_stride +
                      (slot.first + first) * params.grad_q.seqlen_stride;
    return store_floats<Traits>(params, dq, row, slot.rows - first, slot.used - first);
  }
  auto rounded = make_tensor<Element>(dq.layout());
  sm90::convert_fragment<Element>(dq, rounded);

  using Tile = Shape<Int<Traits::kTileM>, Int<Traits::kHeadDim>>;
  using Slice = Shape<Int<Traits::kDqQueries>, Int<Traits::kDqChannels>>;
  auto tile = make_tensor(make_smem_ptr(rows), Tile{}, Stride<Int<kRowElements>, _1>{});
  constexpr bool kByQueries = Traits::kDqSplit == Traits::DqSplit::kQueries;
  auto own =
      local_tile(tile, Slice{}, make_coord(kByQueries ? warpgroup : 0, kByQueries ? 0 : warpgroup));
  auto layout = [&] {
    if constexpr (Traits::kDqTransposed) {
      return select<1, 0>(own.layout());
    } else {
      return own.layout();
    }
  }();
  copy(rounded, mma.get_thread_slice(thread).partition_C(make_tensor(own.data(), layout)));
  __syncthreads();

  constexpr int kLanes = lanes_of_row(Traits::kHeadDim / kVector);
  int const column = threadIdx.x % kLanes * kVector;
  auto* grad_q = static_cast<Element*>(params.grad_q.data) + batch * params.grad_q.batch_stride +
                 head * params.grad_q.head_stride + column;
  for (int row = threadIdx.x / kLanes; row < Traits::kTileM; row += kThreads / kLanes) {
    int const query = block * Traits::kTileM + row;
    if (query < slot.rows && column < params.head_dim) {
      auto& to =
          *reinterpret_cast<uint4*>(grad_q + (slot.first + query) * params.grad_q.seqlen_stride);
      to = *reinterpret_cast<uint4 const*>(rows + row * kRowElements + column);
      if (Traits::kAnyCall && query >= slot.used) to = make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace cute_kernels::attention
