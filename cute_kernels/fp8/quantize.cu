#include <algorithm>
#include <type_traits>

#include "cute_kernels/fp8/quantize_launch.hpp"
#include "cute_kernels/fp8/quantize_rows.hpp"
#include "cute_kernels/fp8/quantize_values.hpp"
#include "cute_kernels/fp8/sample.hpp"
#include "cute_kernels/fp8/score_offset.hpp"
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

// Heads, or their slices, come first in a grid: CTAs that run together read what lies together.

template <class Kernel>
void launch_rows(QuantizeRowsProblem const& p, Chain& chain) {
  chain.launch<quantize_rows_kernel<Kernel>>(blocks_grid(p, p.heads, kBlockRows), Kernel::kThreads,
                                             p);
}

template <class In, class Out, bool kPacked>
void quantize_rows_to(QuantizeRowsProblem const& p, Chain& chain) {
  auto launch = [&](auto layout) {
    launch_rows<QuantizeRows<In, Out, decltype(layout), kPacked>>(p, chain);
  };
  switch (p.head_dim) {
    case 64:
      return launch(RowLayout<4, 2>{});
    case 128:
      return launch(RowLayout<4, 4>{});
    case 256:
      return launch(RowLayout<8, 4>{});
    case 192:
      return launch(RowLayout<8, 3, true>{});
    default:  // an odd number of times 32, or of times 16
      return p.head_dim % 32 == 0 ? launch(RowLayout<4, 7, true>{})
                                  : launch(RowLayout<2, 15, true>{});
  }
}

template <class In, bool kPacked>
void quantize_rows(QuantizeRowsProblem const& p, Chain& chain) {
  p.to_int8 ? quantize_rows_to<In, int8_t, kPacked>(p, chain)
            : quantize_rows_to<In, E4m3, kPacked>(p, chain);
}

template <class In, bool kPacked>
void quantize_values(QuantizeValuesProblem const& p, Chain& chain) {
  int const slices = p.heads * values_slices(p.head_dim);
  chain.launch<quantize_values_kernel<In, kPacked>>(blocks_grid(p, slices, kValueKeys),
                                                    kValueThreads, p);
  if constexpr (!QuantizeValues<In, kPacked>::kMove) {
    chain.launch<quantize_values_again_kernel<In, kPacked>>(dim3(slices, 1, p.batch), kValueThreads,
                                                            p);
  }
}

/// Calls launch(element, is_packed), of the type that a part is in and constants.
template <class Launch>
void with_types(Source const& p, Launch const& launch) {
  auto with_element = [&](auto is_packed) {
    p.type == InputType::kFloat16 ? launch(cutlass::half_t{}, is_packed)
                                  : launch(cutlass::bfloat16_t{}, is_packed);
  };
  p.is_packed() ? with_element(std::true_type{}) : with_element(std::false_type{});
}

}  // namespace

cudaError_t launch_quantize(QuantizeProblem const& p, cudaStream_t stream) {
  Chain chain(stream);
  // Few CTAs are hidden by what comes next: samples by V's first loads, V's second pass by Q.
  if (p.key_center) {
    with_types(*p.key_center, [&](auto element, auto is_packed) {
      chain.launch<center_kernel<decltype(element), is_packed>>(sample_grid(*p.key_center),
                                                                kSampleThreads, *p.key_center);
    });
  }
  if (p.value_maximum) {
    with_types(*p.value_maximum, [&](auto element, auto is_packed) {
      chain.launch<range_kernel<decltype(element), is_packed>>(sample_grid(*p.value_maximum),
                                                               kSampleThreads, *p.value_maximum);
    });
  }
  if (p.v && p.v->type == InputType::kE4m3) {
    p.v->is_packed() ? quantize_values<E4m3, true>(*p.v, chain)
                     : quantize_values<E4m3, false>(*p.v, chain);
  } else if (p.v) {
    with_types(*p.v, [&](auto element, auto is_packed) {
      quantize_values<decltype(element), is_packed>(*p.v, chain);
    });
  }
  if (p.score_offset) {
    with_types(*p.score_offset, [&](auto element, auto is_packed) {
      chain.launch<score_offset_kernel<decltype(element), is_packed>>(
          blocks_grid(*p.score_offset, p.score_offset->heads, kBlockRows), kOffsetThreads,
          *p.score_offset);
    });
  }
  for (auto const* rows : {&p.q, &p.k}) {
    if (!*rows) continue;
    with_types(**rows, [&](auto element, auto is_packed) {
      quantize_rows<decltype(element), is_packed>(**rows, chain);
    });
  }
  return chain.status();
}

cudaError_t launch_add(float* to, float const* from, int64_t count, int device,
                       cudaStream_t stream) {
  sm90::Launch how{};
  how.grid = dim3(static_cast<unsigned>((count + kOffsetThreads - 1) / kOffsetThreads));
  how.threads = kOffsetThreads;
  how.stream = stream;
  how.device = device;
  return sm90::launch_kernel<add_kernel>(how, to, from, count);
}

}  // namespace cute_kernels::fp8
