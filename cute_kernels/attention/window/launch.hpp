#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "cute_kernels/attention/schedule/prepare.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/attention/window/kernel.hpp"
#include "cute_kernels/attention/window/traits.hpp"
#include "cute_kernels/sm90/launch.hpp"
#include "cute_kernels/sm90/tma_boxes.hpp"

namespace cute_kernels::attention {

/// A tensor to TMA: (channels, heads, rows, batch).
template <class Element>
cute::TmaDescriptor window_boxes(TensorView const& view, int channels, int heads, int rows,
                                 int batch, int box_heads, int box_rows) {
  return sm90::tma_boxes<Element>(view.data, {channels, heads, rows, batch},
                                  {view.head_stride, view.seqlen_stride, view.batch_stride},
                                  {box_heads, box_rows, 1});
}

template <class Traits>
WorkList window_work_list(ForwardProblem const& problem) {
  int64_t const most = most_tiles(grouped_call(problem.call), Traits::kTileM);
  return work_list_at(problem.workspace, problem.call.sizes.batch, most);
}

template <class Tile>
int64_t window_workspace_bytes(ForwardProblem const& problem) {
  int64_t const most = most_tiles(grouped_call(problem.call), WindowTraits<Tile>::kTileM);
  return work_list_bytes(problem.call.sizes.batch, most);
}

template <class Traits>
WindowParams window_params(ForwardProblem const& problem) {
  using Element = typename Traits::Element;
  constexpr int kWarpM = Traits::kWarpM;
  AttentionCall const& call = problem.call;
  CallSizes const& sizes = call.sizes;
  GroupedCall const grouped = grouped_call(call);
  int const group = 1 << grouped.group_log2;
  int const batch = tensor_batch(call), queries = tensor_rows_q(call);
  int const keys = tensor_rows_k(call);
  WorkList const list = window_work_list<Traits>(problem);

  WindowParams params{};
  params.keys = Traits::keys(Traits::kWarpgroupM / group);
  int const tile_keys = params.keys.of_tile(Traits::kConsumers);
  params.tma_q = window_boxes<Element>(problem.q, sizes.head_dim, sizes.heads_q, queries, batch,
                                       group, Traits::kTileM / group);
  // A descriptor of no keys is not allowed, and blocks are loaded also where nothing of them is
  // seen: without any keys, of a query.
  auto boxes_of_keys = [&](TensorView const& view, int channels) {
    return keys > 0
               ? window_boxes<Element>(view, channels, sizes.heads_kv, keys, batch, 1, tile_keys)
               : window_boxes<Element>(problem.q, sizes.head_dim, sizes.heads_kv, 1, batch, 1,
                                       tile_keys);
  };
  params.tma_k = boxes_of_keys(problem.k, sizes.head_dim);
  params.tma_v = boxes_of_keys(problem.v, sizes.head_dim_v);
  params.tma_o = window_boxes<Element>(problem.out, sizes.head_dim_v, sizes.heads_q, queries, batch,
                                       std::min(group, kWarpM), std::max(1, kWarpM / group));
  params.count = list.count;
  params.tiles = list.tiles;
  params.heads_kv = cutlass::FastDivmod(sizes.heads_kv);
  params.tile_bytes = 2 * tile_keys * Traits::kRowBytes;
  params.group = group;
  params.group_log2 = grouped.group_log2;
  params.heads_q = sizes.heads_q;
  params.rows = queries;
  params.head_dim_v = sizes.head_dim_v;
  params.scale_log2 = scale_of_scores(call.scale) * sm90::kLog2e;
  params.sinks = call.sinks;
  params.lse = problem.lse;
  params.v = problem.v;
  params.out = problem.out;
  return params;
}

/// Starts the kernel of a tile on `stream`, and before it the one that lists its tiles.
/// Asynchronous.
template <class Tile>
cudaError_t launch_window(ForwardProblem const& problem, cudaStream_t stream) {
  using Traits = WindowTraits<Tile>;
  AttentionCall const& call = problem.call;
  CallSizes const& sizes = call.sizes;
  GroupedCall const grouped = grouped_call(call);
  WindowParams const params = window_params<Traits>(problem);
  int64_t const row_bytes =
      int64_t{sizeof(typename Traits::Element)} * sizes.heads_q * sizes.head_dim_v;
  UnusedRows const unused{problem.out.data, row_bytes, problem.lse, sizes.heads_q,
                          tensor_rows_q(call)};
  cudaError_t const status = start_preparing<typename Traits::Tiling>(
      grouped, window_work_list<Traits>(problem), unused, problem.device, stream);
  if (status != cudaSuccess) return status;

  int64_t const tiles = most_tiles(grouped, Traits::kTileM) * sizes.heads_kv;
  sm90::Launch how{};
  how.grid = dim3(static_cast<unsigned>(
      std::min<int64_t>(std::max<int64_t>(1, tiles), problem.device.multiprocessors)));
  how.threads = Traits::kThreads;
  how.stream = stream;
  how.device = problem.device.index;
  how.shared_bytes = sizeof(typename Traits::SharedStorage);
  static_assert(sizeof(typename Traits::SharedStorage) <= 227 * 1024);
  how.early = true;
  return sm90::launch_kernel<window_kernel<Traits>>(how, params);
}

}  // namespace cute_kernels::attention
