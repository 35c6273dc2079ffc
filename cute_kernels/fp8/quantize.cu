#include <algorithm>

#include "cute_kernels/fp8/quantize_launch.hpp"
#include "cute_kernels/fp8/quantize_rows.hpp"
#include "cute_kernels/fp8/quantize_values.hpp"
#include "cute_kernels/fp8/sample.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::fp8 {
namespace {

using E4m3 = cutlass::float_e4m3_t;

/// Launches kernels in a row. Each may start as soon as all CTAs of the one before it have. Its
/// CTAs call cudaGridDependencySynchronize() before they touch what one before it writes; where
/// none need that, it ends with end_after_previous(). So each one's end is the end of all before
/// it.
class Chain {
 public:
  explicit Chain(cudaStream_t stream) : stream_(stream) {}

  /// `grid`: x counts heads, y blocks, z the batch; one launch after the other where a grid cannot
  /// have as many of these.
  template <auto kKernel, class Problem>
  void launch(dim3 grid, int threads, Problem problem) {
    for (unsigned batch = 0; batch < grid.z; batch += kMost) {
      for (unsigned block = 0; block < grid.y; block += kMost) {
        if (status_ != cudaSuccess) return;
        problem.first_block = static_cast<int>(block);
        problem.first_batch = static_cast<int>(batch);
        sm90::Launch how{};
        how.grid = dim3(grid.x, std::min(grid.y - block, kMost), std::min(grid.z - batch, kMost));
        how.threads = threads;
        how.stream = stream_;
        how.early = !is_first_;
        is_first_ = false;
        status_ = sm90::launch_kernel<kKernel>(how, problem);
      }
    }
  }

  void fail(cudaError_t status) { status_ = status; }
  cudaError_t status() const { return status_; }

 private:
  static constexpr unsigned kMost = 65535;  // of y and z

  cudaStream_t stream_;
  bool is_first_ = true;
  cudaError_t status_ = cudaSuccess;
};

dim3 sample_grid(SampleProblem const& p) {
  return dim3(p.heads, (p.head_dim + kSampleChannels - 1) / kSampleChannels, p.batch);
}

template <class Kernel>
void launch_rows(QuantizeRowsProblem const& p, Chain& chain) {
  // Heads first: CTAs that run together read what lies together.
  dim3 const grid(p.heads, blocks_of_rows(p.seqlen), p.batch);
  chain.launch<quantize_rows_kernel<Kernel>>(grid, Kernel::kThreads, p);
}

template <class In, class Out>
void quantize_rows_to(QuantizeRowsProblem const& p, Chain& chain) {
  switch (p.head_dim) {
    case 64:
      return launch_rows<QuantizeRows<In, Out, 64>>(p, chain);
    case 128:
      return launch_rows<QuantizeRows<In, Out, 128>>(p, chain);
    case 256:
      return launch_rows<QuantizeRows<In, Out, 256>>(p, chain);
    default:
      return chain.fail(cudaErrorInvalidValue);
  }
}

template <class In>
void quantize_rows(QuantizeRowsProblem const& p, Chain& chain) {
  p.to_int8 ? quantize_rows_to<In, int8_t>(p, chain) : quantize_rows_to<In, E4m3>(p, chain);
}

template <class In>
void quantize_values(QuantizeValuesProblem const& p, Chain& chain) {
  int const blocks = (p.seqlen - 1) / kValueKeys + 1;
  chain.launch<quantize_values_kernel<In>>(values_grid(p, blocks), kValueThreads, p);
  if constexpr (!QuantizeValues<In>::kMove) {
    chain.launch<quantize_values_again_kernel<In>>(values_grid(p, 1), kValueThreads, p);
  }
}

/// Calls launch(element), of the type that a 16-bit part is in.
template <class Launch>
void with_element(InputType type, Launch const& launch) {
  type == InputType::kFloat16 ? launch(cutlass::half_t{}) : launch(cutlass::bfloat16_t{});
}

}  // namespace

cudaError_t launch_quantize(QuantizeProblem const& p, cudaStream_t stream) {
  Chain chain(stream);
  // Few CTAs are hidden by what comes next: samples by V's first loads, V's second pass by Q.
  if (p.key_center) {
    with_element(p.key_center->type, [&](auto element) {
      chain.launch<center_kernel<decltype(element)>>(sample_grid(*p.key_center), kSampleThreads,
                                                     *p.key_center);
    });
  }
  if (p.value_maximum) {
    with_element(p.value_maximum->type, [&](auto element) {
      chain.launch<range_kernel<decltype(element)>>(sample_grid(*p.value_maximum), kSampleThreads,
                                                    *p.value_maximum);
    });
  }
  if (p.v && p.v->type == InputType::kE4m3) {
    quantize_values<E4m3>(*p.v, chain);
  } else if (p.v) {
    with_element(p.v->type, [&](auto element) { quantize_values<decltype(element)>(*p.v, chain); });
  }
  if (p.q) {
    with_element(p.q->type, [&](auto element) { quantize_rows<decltype(element)>(*p.q, chain); });
  }
  if (p.k) {
    with_element(p.k->type, [&](auto element) { quantize_rows<decltype(element)>(*p.k, chain); });
  }
  return chain.status();
}

}  // namespace cute_kernels::fp8
