#include <algorithm>

#include "cute_kernels/cache/append.hpp"
#include "cute_kernels/cache/launch.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::cache {
namespace {

constexpr int kMany = 2048;  // tokens, from which on a thread has several

template <class Element>
cudaError_t append(AppendProblem const& problem, int device, cudaStream_t stream) {
  int const pairs = distant_pairs(problem.rotary);
  Queries const& queries = problem.queries;
  bool const many = std::max(problem.tokens.total, queries.tokens.total) >= kMany;
  Share const share = share_of(units_of_row(problem.k, pairs) + units_of_row(problem.v, 0), many);
  Share const share_of_queries = share_of(units_of_row(queries.rows, pairs), many);
  int const append_ctas = std::max(1, ctas_of(problem.tokens, share, many));
  sm90::Launch how{};
  how.grid = dim3(append_ctas + ctas_of(queries.tokens, share_of_queries, many));
  how.threads = kCtaThreads;
  how.stream = stream;
  how.device = device;
  how.early = true;
  return many ? sm90::launch_kernel<append_kernel<Element, kAtOnce>>(how, problem, share,
                                                                     share_of_queries, append_ctas)
              : sm90::launch_kernel<append_kernel<Element, 1>>(how, problem, share,
                                                               share_of_queries, append_ctas);
}

}  // namespace

cudaError_t launch_append(AppendProblem const& problem, attention::Device const& device,
                          cudaStream_t stream) {
  return problem.is_float16 ? append<cutlass::half_t>(problem, device.index, stream)
                            : append<cutlass::bfloat16_t>(problem, device.index, stream);
}

}  // namespace cute_kernels::cache
