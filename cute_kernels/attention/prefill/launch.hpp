#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "cute_kernels/attention/decode/cache_boxes.hpp"
#include "cute_kernels/attention/forward/kernel.hpp"
#include "cute_kernels/attention/forward/mainloop.hpp"
#include "cute_kernels/attention/prefill/boxes.hpp"
#include "cute_kernels/attention/prefill/cut.hpp"
#include "cute_kernels/attention/prefill/epilogue.hpp"
#include "cute_kernels/attention/prefill/load.hpp"
#include "cute_kernels/attention/prefill/sequences.hpp"
#include "cute_kernels/attention/prefill/tile_config.hpp"
#include "cute_kernels/attention/prefill/traits.hpp"
#include "cute_kernels/attention/schedule/prepare.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::attention {

/// What TileCut says, of one CTA. A thread has a tile; their pieces' order does not matter.
template <class Traits>
CUTLASS_DEVICE void cut_last_tiles(WorkList const& list, int heads, int ctas) {
  __shared__ int end;
  TileCut const cut(*list.count, heads, ctas, Traits::kConsumers);
  int const own = cut.first + threadIdx.x;
  WorkTile const tile = list.tiles[own < *list.count ? own : 0];
  bool const is_cut = own < *list.count;
  if (threadIdx.x == 0) end = cut.first;
  __syncthreads();
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cut.pieces; ++i) {
    WorkTile const piece = piece_of(tile, i, Traits::kWarpgroupM);
    if (is_cut && has_rows(piece, Traits::kWarpgroupM)) list.tiles[atomicAdd(&end, 1)] = piece;
  }
  __syncthreads();
  if (threadIdx.x == 0) *list.count = end;
}

/// As prepare_kernel; only it cuts tiles, and reads lengths that the kernel before may have
/// written.
template <class Traits>
__global__ void __launch_bounds__(WorkListBuilder<typename Traits::Tiling, CachedCall>::kThreads)
    prepare_prefill_kernel(CUTE_GRID_CONSTANT CachedCall const call,
                           CUTE_GRID_CONSTANT WorkList const list, int ctas,
                           CUTE_GRID_CONSTANT UnusedRows const unused) {
  using Builder = WorkListBuilder<typename Traits::Tiling, CachedCall>;
  sm90::wait_for_previous_kernel();
  sm90::let_next_kernel_start();
  if (blockIdx.x > 0) {
    QuerySlots const slots{call.lengths.cu_seqlens_q, nullptr, call.total_q, call.batch};
    clear_unused_slots(slots, unused, blockIdx.x - 1, gridDim.x - 1, Builder::kThreads);
    return;
  }
  __shared__ typename Builder::Shared shared;
  Builder builder(call, list, shared);
  cute::for_each(cute::make_seq<Builder::kPhases>{}, [&](auto phase) {
    builder.template phase<phase>(threadIdx.x);
    __syncthreads();
  });
  cut_last_tiles<Traits>(list, call.heads_kv, ctas);
}

template <class Traits>
WorkList prefill_work_list(DecodeProblem const& problem) {
  return work_list_at(problem.workspace, problem.call.batch,
                      most_tiles(problem.call, Traits::kTileM));
}

template <class Traits>
int prefill_ctas(DecodeProblem const& problem) {
  int64_t const tiles = most_tiles(problem.call, Traits::kTileM) * problem.call.heads_kv;
  int64_t const of_one_warpgroup = std::max<int64_t>(1, tiles) * Traits::kConsumers;
  return static_cast<int>(std::min<int64_t>(of_one_warpgroup, problem.device.multiprocessors));
}

template <class Tile>
int64_t prefill_workspace_bytes(DecodeProblem const& problem) {
  using Traits = PrefillTraits<Tile>;
  int const cut =
      most_cut(problem.call.heads_kv, prefill_ctas<Traits>(problem), Traits::kConsumers);
  return work_list_bytes(problem.call.batch, most_tiles(problem.call, Traits::kTileM) + cut);
}

/// Starts the kernel of a tile on `stream`, and before it the one that lists its tiles.
/// Asynchronous.
template <class Tile>
cudaError_t launch_prefill(DecodeProblem const& problem, cudaStream_t stream) {
  using Traits = PrefillTraits<Tile>;
  using Element = typename Traits::Element;
  using Mainloop = ForwardMainloop<Traits>;
  using Params = PrefillParams<Traits>;
  CachedCall const& call = problem.call;
  WorkList const list = prefill_work_list<Traits>(problem);

  Params params{};
  params.scheduler = Params::Scheduler::make_params(list, call.heads_kv);
  params.group = cutlass::FastDivmod(call.group);
  params.sinks = problem.sinks;
  params.box_rows = rows_of_boxes(problem, Traits::kTileN);
  params.boxes_k =
      boxes_of<Element>(problem.k, call.head_dim, call.heads_kv, problem.pages, params.box_rows);
  params.boxes_v =
      boxes_of<Element>(problem.v, call.head_dim_v, call.heads_kv, problem.pages, params.box_rows);
  params.pages = problem.pages;
  params.page_size = cutlass::FastDivmod(problem.pages.page_size);
  params.q = problem.q;
  params.v = problem.v;
  params.head_dim = call.head_dim;
  params.head_dim_v = call.head_dim_v;
  params.heads_q = call.heads_q;
  params.total_q = call.total_q;
  params.out = problem.out;
  params.lse = problem.lse;
  params.scale_log2 = scale_of_scores(call.scale) * sm90::kLog2e;

  sm90::Launch how{};
  how.stream = stream;
  how.device = problem.device.index;
  how.early = may_start_early(problem.device);
  how.threads = WorkListBuilder<typename Traits::Tiling, CachedCall>::kThreads;
  int const clearing = (call.total_q + how.threads - 1) / how.threads;
  how.grid = dim3(1 + std::min(clearing, problem.device.multiprocessors));
  int64_t const row_bytes = int64_t{sizeof(Element)} * call.heads_q * call.head_dim_v;
  UnusedRows const unused{problem.out, row_bytes, problem.lse, call.heads_q, call.total_q};
  cudaError_t const status = sm90::launch_kernel<prepare_prefill_kernel<Traits>>(
      how, call, list, prefill_ctas<Traits>(problem), unused);
  if (status != cudaSuccess) return status;

  how.early = true;
  how.grid = dim3(prefill_ctas<Traits>(problem));
  how.threads = Traits::kThreads;
  how.shared_bytes = sizeof(typename Traits::SharedStorage);
  static_assert(sizeof(typename Traits::SharedStorage) <= 227 * 1024);
  constexpr auto kKernel =
      forward_kernel<Mainloop, CacheProducer<Traits>, GroupedEpilogue<Traits>, Params>;
  return sm90::launch_kernel<kKernel>(how, params);
}

}  // namespace cute_kernels::attention
