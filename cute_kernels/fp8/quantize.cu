#include <algorithm>

#include "cute_kernels/fp8/key_mean.hpp"
#include "cute_kernels/fp8/quantize_launch.hpp"
#include "cute_kernels/fp8/quantize_rows.hpp"
#include "cute_kernels/fp8/quantize_values.hpp"

namespace cute_kernels::fp8 {
namespace {

using E4m3 = cutlass::float_e4m3_t;

template <class In, class Out, int kHeadDim, int kRows>
cudaError_t quantize_rows(QuantizeRowsProblem const& p, cudaStream_t stream) {
  using Kernel = QuantizeRows<In, Out, kHeadDim, kRows>;
  // Heads first: CTAs that run together read what lies together.
  dim3 const grid(p.heads, (p.seqlen + kBlockRows - 1) / kBlockRows, p.batch);
  quantize_rows_kernel<Kernel><<<grid, Kernel::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class In, class Out>
cudaError_t quantize_rows(QuantizeRowsProblem const& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return quantize_rows<In, Out, 64, 2>(p, stream);
    case 128:
      return quantize_rows<In, Out, 128, 1>(p, stream);
    case 256:
      return quantize_rows<In, Out, 256, 1>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class In>
cudaError_t quantize_values(QuantizeValuesProblem const& p, cudaStream_t stream) {
  constexpr int kGroupItems = 128;  // 4 MB of L2
  constexpr int kLagBeyondGroup = 132;
  ValueOrder order;
  order.slices = p.batch * p.heads * static_cast<int>(values_slices(p.head_dim));
  order.blocks = (p.seqlen + kValueKeys - 1) / kValueKeys;
  order.group_slices = std::min(order.slices, std::max(1, kGroupItems / order.blocks));
  order.lag = order.group_slices * order.blocks + kLagBeyondGroup;
  int grid = order.items();
  if constexpr (!QuantizeValues<In>::kMove) {
    grid = order.ctas();
    size_t const bytes = sizeof(float) * values_scratch(p.batch, p.heads, p.head_dim);
    cudaError_t const status = cudaMemsetAsync(p.maximum, 0, bytes, stream);
    if (status != cudaSuccess) return status;
  }
  quantize_values_kernel<In><<<grid, kValueThreads, 0, stream>>>(p, order);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_quantize_rows(QuantizeRowsProblem const& p, InputType in, bool to_int8,
                                 cudaStream_t stream) {
  if (in == InputType::kFloat16) {
    return to_int8 ? quantize_rows<cutlass::half_t, int8_t>(p, stream)
                   : quantize_rows<cutlass::half_t, E4m3>(p, stream);
  }
  return to_int8 ? quantize_rows<cutlass::bfloat16_t, int8_t>(p, stream)
                 : quantize_rows<cutlass::bfloat16_t, E4m3>(p, stream);
}

cudaError_t launch_quantize_values(QuantizeValuesProblem const& p, InputType in,
                                   cudaStream_t stream) {
  if (in == InputType::kE4m3) return quantize_values<E4m3>(p, stream);
  return in == InputType::kFloat16 ? quantize_values<cutlass::half_t>(p, stream)
                                   : quantize_values<cutlass::bfloat16_t>(p, stream);
}

cudaError_t launch_key_mean(KeyMeanProblem const& p, InputType in, cudaStream_t stream) {
  dim3 const grid(p.heads, p.batch, (p.head_dim + kMeanChannels - 1) / kMeanChannels);
  if (in == InputType::kFloat16) {
    key_mean_kernel<cutlass::half_t><<<grid, kMeanThreads, 0, stream>>>(p);
  } else {
    key_mean_kernel<cutlass::bfloat16_t><<<grid, kMeanThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace cute_kernels::fp8
