#include <algorithm>

#include "cute_kernels/cache/append.hpp"
#include "cute_kernels/cache/launch.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::cache {
namespace {

constexpr int kMany = 2048;  // tokens, from which on a thread has several
constexpr int kAtOnce = 2;

/// Few tokens have a thread for each unit; of many, a thread has several units.
Share share_of(int units, int tokens) {
  int const most = tokens < kMany ? kCtaThreads : 2 * kWarpThreads;
  int threads = kWarpThreads;
  while (threads < units && threads < most) threads *= 2;
  return {threads};
}

template <auto kFew, auto kSeveral, class Problem>
cudaError_t launch(Problem const& problem, int units, int device, cudaStream_t stream) {
  int const tokens = problem.tokens.total;
  Share const share = share_of(units, tokens);
  int const tokens_per_cta = share.stride() * (tokens < kMany ? 1 : kAtOnce);
  sm90::Launch how{};
  how.grid = dim3(std::max(1, (tokens - 1) / tokens_per_cta + 1));
  how.threads = kCtaThreads;
  how.stream = stream;
  how.device = device;
  how.early = true;
  return tokens < kMany ? sm90::launch_kernel<kFew>(how, problem, share)
                        : sm90::launch_kernel<kSeveral>(how, problem, share);
}

template <class Element>
cudaError_t append(AppendProblem const& p, int device, cudaStream_t stream) {
  int const units = p.k.heads * (units_of_head(p.k.head_dim, distant_pairs(p.rotary)) +
                                 units_of_head(p.v.head_dim, 0));
  return launch<append_kernel<Element, 1>, append_kernel<Element, kAtOnce>>(p, units, device,
                                                                            stream);
}

template <class Element>
cudaError_t rotate(RotateProblem const& p, int device, cudaStream_t stream) {
  int const units = p.x.heads * units_of_head(p.x.head_dim, distant_pairs(p.rotary));
  return launch<rotate_kernel<Element, 1>, rotate_kernel<Element, kAtOnce>>(p, units, device,
                                                                            stream);
}

}  // namespace

cudaError_t launch_append(AppendProblem const& problem, attention::Device const& device,
                          cudaStream_t stream) {
  return problem.is_float16 ? append<cutlass::half_t>(problem, device.index, stream)
                            : append<cutlass::bfloat16_t>(problem, device.index, stream);
}

cudaError_t launch_rotate(RotateProblem const& problem, attention::Device const& device,
                          cudaStream_t stream) {
  return problem.is_float16 ? rotate<cutlass::half_t>(problem, device.index, stream)
                            : rotate<cutlass::bfloat16_t>(problem, device.index, stream);
}

}  // namespace cute_kernels::cache
