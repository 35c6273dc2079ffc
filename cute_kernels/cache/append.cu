#include <algorithm>

#include "cute_kernels/cache/append.hpp"
#include "cute_kernels/cache/launch.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::cache {
namespace {

/// At least as many threads as a token has units, as far as a CTA has them.
Share share_of(int units) {
  int threads = kWarpThreads;
  while (threads < units && threads < kCtaThreads) threads *= 2;
  return {threads};
}

sm90::Launch how_to_launch(int tokens, Share share, int device, cudaStream_t stream) {
  int const tokens_per_cta = kCtaThreads / share.threads_per_token;
  sm90::Launch how{};
  how.grid = dim3(std::max(1, (tokens - 1) / tokens_per_cta + 1));
  how.threads = kCtaThreads;
  how.stream = stream;
  how.device = device;
  how.early = true;
  return how;
}

}  // namespace

cudaError_t launch_append(AppendProblem const& problem, attention::Device const& device,
                          cudaStream_t stream) {
  int const pairs = distant_pairs(problem.rotary);
  Share const share = share_of(problem.k.heads * (units_of_head(problem.k.head_dim, pairs) +
                                                  units_of_head(problem.v.head_dim, 0)));
  sm90::Launch const how = how_to_launch(problem.tokens.total, share, device.index, stream);
  return problem.is_float16
             ? sm90::launch_kernel<append_kernel<cutlass::half_t>>(how, problem, share)
             : sm90::launch_kernel<append_kernel<cutlass::bfloat16_t>>(how, problem, share);
}

cudaError_t launch_rotate(RotateProblem const& problem, attention::Device const& device,
                          cudaStream_t stream) {
  int const pairs = distant_pairs(problem.rotary);
  Share const share = share_of(problem.x.heads * units_of_head(problem.x.head_dim, pairs));
  sm90::Launch const how = how_to_launch(problem.tokens.total, share, device.index, stream);
  return problem.is_float16
             ? sm90::launch_kernel<rotate_kernel<cutlass::half_t>>(how, problem, share)
             : sm90::launch_kernel<rotate_kernel<cutlass::bfloat16_t>>(how, problem, share);
}

}  // namespace cute_kernels::cache
