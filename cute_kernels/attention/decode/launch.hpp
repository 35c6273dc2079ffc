#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "cute_kernels/attention/decode/kernel.hpp"
#include "cute_kernels/attention/decode/prepare.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::attention {

/// The kernel's CTAs, all at once.
template <class Traits>
int decode_ctas(Device const& device) {
  return device.multiprocessors * Traits::kCtas;
}

/// What lies in the workspace of a launch: parts of items, then the work's list.
template <class Traits>
struct DecodeWorkspace {
  int64_t slots;
  int64_t statistics;  // where they begin, in bytes
  int64_t work;
  int64_t bytes;

  DecodeWorkspace(int batch, int ctas)
      : slots(2 * int64_t{ctas} * Traits::kTileRows),
        statistics(slots * Traits::kHeadDim * int64_t{sizeof(float)}),
        work(statistics + slots * int64_t{sizeof(RowStatistics)}),
        bytes(work + decode_work_bytes(batch, ctas)) {}
};

template <class Tile>
int64_t decode_workspace_bytes(DecodeProblem const& problem) {
  using Traits = DecodeTraits<Tile>;
  return DecodeWorkspace<Traits>(problem.call.batch, decode_ctas<Traits>(problem.device)).bytes;
}

inline ScoreUnits score_units(CachedCall const& call) {
  float const scale = scale_of_scores(call.scale);
  if (call.softcap <= 0) return {0.f, 0.f, scale * sm90::kLog2e};
  return {scale / call.softcap, call.softcap, sm90::kLog2e};
}

/// Starts the kernel of a tile on `stream`, and before it the one that deals its work.
/// Asynchronous.
template <class Tile>
cudaError_t launch_decode(DecodeProblem const& problem, cudaStream_t stream) {
  using Traits = DecodeTraits<Tile>;
  CachedCall const& call = problem.call;
  int const ctas = decode_ctas<Traits>(problem.device);
  DecodeWorkspace<Traits> const workspace(call.batch, ctas);
  char* const memory = static_cast<char*>(problem.workspace);
  DecodeWork const work = decode_work_at(memory + workspace.work, call.batch, ctas);

  sm90::Launch how{};
  how.threads = kDealThreads;
  how.grid = dim3(1 + std::min<int64_t>((int64_t{call.total_q} + kDealThreads - 1) / kDealThreads,
                                        problem.device.multiprocessors));
  how.stream = stream;
  how.device = problem.device.index;
  int64_t const row_bytes =
      int64_t{sizeof(typename Traits::Element)} * call.heads_q * call.head_dim_v;
  UnusedRows const unused{problem.out, row_bytes, problem.lse, call.heads_q};
  cudaError_t const status =
      sm90::launch_kernel<deal_kernel<Traits>>(how, call, ctas, problem.num_splits, work, unused);
  if (status != cudaSuccess) return status;

  DecodeParams const params{
      call,
      {problem.pages, cutlass::FastDivmod(problem.pages.page_size),
       cutlass::FastDivmod(call.heads_q / call.heads_kv), problem.q, problem.k, problem.v},
      score_units(call),
      {problem.sinks, problem.out, problem.lse, reinterpret_cast<float*>(memory),
       reinterpret_cast<RowStatistics*>(memory + workspace.statistics), work.arrivals, ctas},
      work.line,
      work.places};
  how.threads = Traits::kThreads;
  how.grid = dim3(ctas);
  how.shared_bytes = sizeof(typename Traits::SharedStorage);
  how.early = true;
  return sm90::launch_kernel<decode_kernel<Traits>>(how, params);
}

}  // namespace cute_kernels::attention
