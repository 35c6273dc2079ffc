#include <algorithm>

#include "cute_kernels/cache/fp8_append.hpp"
#include "cute_kernels/cache/launch.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::cache {
namespace {

/// Lanes for kVector channels of a head each: a power of 2, up to a warp's.
int lanes_of_head(Fp8AppendProblem const& problem) {
  int const vectors = std::max(problem.k.head_dim, problem.v.head_dim) / kVector;
  int lanes = 1;
  while (lanes < vectors) lanes *= 2;
  return lanes;
}

template <class Element>
cudaError_t append(Fp8AppendProblem const& problem, int device, cudaStream_t stream) {
  Queries const& queries = problem.queries;
  int const units = units_of_row(queries.rows, distant_pairs(problem.rotary));
  Share const share_of_queries = share_of(units, false);
  int const lanes = lanes_of_head(problem);
  int64_t const heads = int64_t{problem.tokens.total} * 2 * problem.k.heads;
  int64_t const append_ctas = std::max<int64_t>(1, (heads * lanes - 1) / kCtaThreads + 1);
  sm90::Launch how{};
  how.grid = dim3(append_ctas + ctas_of(queries.tokens, share_of_queries, false));
  how.threads = kCtaThreads;
  how.stream = stream;
  how.device = device;
  how.early = true;
  return sm90::launch_kernel<fp8_append_kernel<Element>>(how, problem, lanes, share_of_queries,
                                                         static_cast<int>(append_ctas));
}

}  // namespace

cudaError_t launch_fp8_append(Fp8AppendProblem const& problem, attention::Device const& device,
                              cudaStream_t stream) {
  return problem.is_float16 ? append<cutlass::half_t>(problem, device.index, stream)
                            : append<cutlass::bfloat16_t>(problem, device.index, stream);
}

}  // namespace cute_kernels::cache
