#include "cute_kernels/fp8/quantize.hpp"

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

namespace cute_kernels::fp8 {
namespace {

using E4m3 = cutlass::float_e4m3_t;

template <class In, class Out>
cudaError_t quantize_rows(QuantizeRowsProblem const& p, cudaStream_t stream) {
  // Heads first: CTAs that run together read what lies together.
  dim3 const grid(p.heads, (p.seqlen + kBlockRows - 1) / kBlockRows, p.batch);
  switch (p.head_dim) {
    case 64:
      quantize_rows_kernel<In, Out, 64><<<grid, kQuantizeThreads, 0, stream>>>(p);
      break;
    case 128:
      quantize_rows_kernel<In, Out, 128><<<grid, kQuantizeThreads, 0, stream>>>(p);
      break;
    case 256:
      quantize_rows_kernel<In, Out, 256><<<grid, kQuantizeThreads, 0, stream>>>(p);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <class In>
cudaError_t quantize_values(QuantizeValuesProblem const& p, cudaStream_t stream) {
  if constexpr (!std::is_same_v<In, E4m3>) {
    size_t const bytes = sizeof(float) * p.batch * p.heads * p.head_dim;
    cudaError_t const status = cudaMemsetAsync(p.maximum, 0, bytes, stream);
    if (status != cudaSuccess) return status;
    constexpr int kRows = 512;
    dim3 const grid(p.heads, (p.seqlen + kRows - 1) / kRows, p.batch);
    value_maximum_kernel<In><<<grid, kQuantizeThreads, 0, stream>>>(p, kRows);
  }
  dim3 const grid((p.seqlen + kTransposeKeys - 1) / kTransposeKeys, p.heads, p.batch);
  transpose_values_kernel<In><<<grid, kQuantizeThreads, 0, stream>>>(p);
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
  dim3 const grid(p.heads, p.batch);
  if (in == InputType::kFloat16) {
    key_mean_kernel<cutlass::half_t><<<grid, kQuantizeThreads, 0, stream>>>(p);
  } else {
    key_mean_kernel<cutlass::bfloat16_t><<<grid, kQuantizeThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace cute_kernels::fp8
