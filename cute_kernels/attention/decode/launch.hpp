#pragma once

#include <cuda_runtime.h>

#include "cute_kernels/attention/decode/kernel.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::attention {

/// The kernel's CTAs, all at once.
template <class Traits>
int decode_ctas(Device const& device) {
  return device.multiprocessors * Traits::kCtas;
}

/// What lies in the workspace of a launch, where it begins, in bytes.
template <class Traits>
struct DecodeWorkspace {
  int64_t statistics;
  int64_t flags;
  int64_t end;

  explicit DecodeWorkspace(int ctas) {
    int64_t const slots = 2 * int64_t{ctas};
    statistics = slots * Traits::kTileRows * Traits::kHeadDim * int64_t{sizeof(float)};
    flags = statistics + slots * Traits::kTileRows * int64_t{sizeof(RowStatistics)};
    end = flags + slots * int64_t{sizeof(uint64_t)};
  }
};

template <class Tile>
int64_t decode_workspace_bytes(DecodeProblem const& problem) {
  using Traits = DecodeTraits<Tile>;
  return DecodeWorkspace<Traits>(decode_ctas<Traits>(problem.device)).end;
}

inline ScoreUnits score_units(CachedCall const& call) {
  float const scale = scale_of_scores(call.scale);
  if (call.softcap <= 0) return {0.f, 0.f, scale * sm90::kLog2e};
  return {scale / call.softcap, call.softcap, sm90::kLog2e};
}

template <class Traits>
cudaError_t launch_decode_kernel(DecodeProblem const& problem,
                                 typename Traits::Format const& format, bool out_is_bfloat16,
                                 cudaStream_t stream) {
  CachedCall const& call = problem.call;
  int const ctas = decode_ctas<Traits>(problem.device);
  DecodeWorkspace<Traits> const workspace(ctas);
  char* const memory = static_cast<char*>(problem.workspace);
  DecodeParams<Traits> const params{
      call,
      {problem.pages, cutlass::FastDivmod(problem.pages.page_size), cutlass::FastDivmod(call.group),
       problem.q, problem.k, problem.v},
      score_units(call),
      {problem.sinks, problem.out, problem.lse, reinterpret_cast<float*>(memory),
       reinterpret_cast<RowStatistics*>(memory + workspace.statistics),
       reinterpret_cast<uint64_t*>(memory + workspace.flags), problem.ticket, out_is_bfloat16},
      problem.num_splits,
      format};
  sm90::Launch how{};
  how.threads = Traits::kThreads;
  how.grid = dim3(ctas);
  how.stream = stream;
  how.device = problem.device.index;
  how.shared_bytes = sizeof(typename Traits::SharedStorage);
  how.early = true;
  return sm90::launch_kernel<decode_kernel<Traits>>(how, params);
}

/// Starts the kernel of a tile on `stream`. Asynchronous.
template <class Tile>
cudaError_t launch_decode(DecodeProblem const& problem, cudaStream_t stream) {
  using Traits = DecodeTraits<Tile>;
  constexpr bool kIsBFloat16 = std::is_same_v<typename Traits::Element, cutlass::bfloat16_t>;
  return launch_decode_kernel<Traits>(problem, {}, kIsBFloat16, stream);
}

}  // namespace cute_kernels::attention
