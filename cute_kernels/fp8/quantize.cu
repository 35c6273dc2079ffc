#include <algorithm>

#include "cute_kernels/fp8/key_mean.hpp"
#include "cute_kernels/fp8/quantize_launch.hpp"
#include "cute_kernels/fp8/quantize_rows.hpp"
#include "cute_kernels/fp8/quantize_values.hpp"

namespace cute_kernels::fp8 {
namespace {

using E4m3 = cutlass::float_e4m3_t;

/// Launches kernels in a row. Each may start as soon as all CTAs of the one before it have, calls
/// cudaGridDependencySynchronize() before it touches what one before it writes, and ends with
/// end_after_previous().
class Chain {
 public:
  explicit Chain(cudaStream_t stream) : stream_(stream) {}

  void clear(void* data, size_t bytes) {
    if (status_ == cudaSuccess) status_ = cudaMemsetAsync(data, 0, bytes, stream_);
  }

  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads,
              Parameters const&... arguments) {
    if (status_ != cudaSuccess) return;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = is_first_ ? 0 : 1;
    is_first_ = false;
    status_ = cudaLaunchKernelEx(&config, kernel, arguments...);
  }

  void fail(cudaError_t status) { status_ = status; }
  cudaError_t status() const { return status_; }

 private:
  cudaStream_t stream_;
  bool is_first_ = true;
  cudaError_t status_ = cudaSuccess;
};

template <class In>
void key_mean(KeyMeanProblem const& p, Chain& chain) {
  dim3 const grid(p.heads, p.batch, (p.head_dim + kMeanChannels - 1) / kMeanChannels);
  chain.launch(key_mean_kernel<In>, grid, kMeanThreads, p);
}

template <class Kernel>
void launch_rows(QuantizeRowsProblem const& p, Chain& chain) {
  // Heads first: CTAs that run together read what lies together.
  dim3 const grid(p.heads, (p.seqlen + kBlockRows - 1) / kBlockRows, p.batch);
  chain.launch(quantize_rows_kernel<Kernel>, grid, Kernel::kThreads, p);
}

template <class In, class Out>
void quantize_rows_to(QuantizeRowsProblem const& p, Chain& chain) {
  switch (p.head_dim) {
    case 64:
      return launch_rows<QuantizeRows<In, Out, 64, 2>>(p, chain);
    case 128:
      return launch_rows<QuantizeRows<In, Out, 128, 1>>(p, chain);
    case 256:
      return launch_rows<QuantizeRows<In, Out, 256, 1>>(p, chain);
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
  constexpr int kGroupItems = 128;  // 4 MB of L2
  constexpr int kLagBeyondGroup = 132;
  ValueOrder order;
  order.slices = p.batch * p.heads * static_cast<int>(values_slices(p.head_dim));
  order.blocks = (p.seqlen + kValueKeys - 1) / kValueKeys;
  order.group_slices = std::min(order.slices, std::max(1, kGroupItems / order.blocks));
  order.lag = order.group_slices * order.blocks + kLagBeyondGroup;
  int const grid = QuantizeValues<In>::kMove ? order.items() : order.ctas();
  chain.launch(quantize_values_kernel<In>, grid, kValueThreads, p, order);
}

}  // namespace

cudaError_t launch_quantize(QuantizeProblem const& p, cudaStream_t stream) {
  using Half = cutlass::half_t;
  using BFloat16 = cutlass::bfloat16_t;
  auto is_half = [](auto const& part) { return part.type == InputType::kFloat16; };
  Chain chain(stream);
  if (p.v && p.v->maximum != nullptr) {
    chain.clear(p.v->maximum,
                sizeof(float) * values_scratch(p.v->batch, p.v->heads, p.v->head_dim));
  }
  // K last: its mean, which takes long and has few CTAs, is there by then.
  if (p.key_mean) {
    is_half(*p.key_mean) ? key_mean<Half>(*p.key_mean, chain)
                         : key_mean<BFloat16>(*p.key_mean, chain);
  }
  if (p.q) {
    is_half(*p.q) ? quantize_rows<Half>(*p.q, chain) : quantize_rows<BFloat16>(*p.q, chain);
  }
  if (p.v) {
    p.v->type == InputType::kE4m3 ? quantize_values<E4m3>(*p.v, chain)
    : is_half(*p.v)               ? quantize_values<Half>(*p.v, chain)
                                  : quantize_values<BFloat16>(*p.v, chain);
  }
  if (p.k) {
    is_half(*p.k) ? quantize_rows<Half>(*p.k, chain) : quantize_rows<BFloat16>(*p.k, chain);
  }
  return chain.status();
}

}  // namespace cute_kernels::fp8
