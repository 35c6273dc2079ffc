#pragma once

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/epilogue.hpp"
#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/sm90/launch.hpp"

// What the launches of kernels that walk over a line of blocks have in common.
namespace cute_kernels::attention {

/// The kernel's CTAs, all at once.
template <class Traits>
int decode_ctas(Device const& device) {
  return device.multiprocessors * Traits::kCtas;
}

/// How a kernel of so many CTAs is launched.
template <class Traits>
sm90::Launch decode_launch(Device const& device, int ctas, cudaStream_t stream) {
  sm90::Launch how{};
  how.threads = Traits::kThreads;
  how.grid = dim3(ctas);
  how.stream = stream;
  how.device = device.index;
  how.shared_bytes = sizeof(typename Traits::SharedStorage);
  how.early = may_start_early(device);
  return how;
}

/// What lies in the workspace of a launch, where it begins, in bytes.
template <class Traits>
struct DecodeWorkspace {
  int64_t statistics;
  int64_t counters;
  int64_t end;

  explicit DecodeWorkspace(int ctas) {
    int64_t const slots = 2 * int64_t{ctas};
    int64_t const rows = slots * PartRows<Traits>::kCount;
    statistics = rows * Traits::kHeadDim * int64_t{sizeof(float)};
    counters = statistics + rows * int64_t{sizeof(RowStatistics)};
    end = counters + ctas * int64_t{sizeof(uint64_t)};
  }
};

inline ScoreUnits score_units(CachedCall const& call) {
  float const scale = scale_of_scores(call.scale);
  constexpr float kLeast = 0x1p-100f;  // a denormal number would be none
  if (call.softcap <= 0) return {0.f, 0.f, scale * sm90::kLog2e};
  return {softcap_factor(scale, call.softcap), std::clamp(call.softcap, kLeast, kLargestSoftcap),
          sm90::kLog2e};
}

inline CacheSource cache_source(DecodeProblem const& problem) {
  return {problem.pages,
          cutlass::FastDivmod(problem.pages.page_size),
          cutlass::FastDivmod(problem.call.group),
          problem.q,
          problem.k,
          problem.v};
}

template <class Traits>
DecodeResults decode_results(DecodeProblem const& problem, int ctas, bool out_is_bfloat16) {
  DecodeWorkspace<Traits> const workspace(ctas);
  char* const memory = static_cast<char*>(problem.workspace);
  return {problem.sinks,
          problem.out,
          problem.lse,
          reinterpret_cast<float*>(memory),
          reinterpret_cast<RowStatistics*>(memory + workspace.statistics),
          reinterpret_cast<uint64_t*>(memory + workspace.counters),
          problem.ticket,
          out_is_bfloat16};
}

}  // namespace cute_kernels::attention
