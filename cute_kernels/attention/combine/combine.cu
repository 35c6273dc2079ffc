#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include "cute_kernels/attention/combine/problem.hpp"
#include "cute_kernels/sm90/launch.hpp"
#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;

CUTLASS_DEVICE int64_t offset(CombineProblem::Strides const& strides, int split, int batch,
                              int seqlen, int head) {
  return split * strides.split + batch * strides.batch + seqlen * strides.seqlen +
         head * strides.head;
}

/// A warp has a row, its lanes the LSE of a part each and kVector columns at a time each. A part
/// whose LSE is -inf is not read.
template <class Element, int kVector>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineProblem const p) {
  using Vector = cutlass::AlignedArray<float, kVector>;
  int const lane = threadIdx.x % kLanes;
  int64_t const row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes;
  if (row >= int64_t{p.batch} * p.seqlen * p.heads) return;
  int const head = static_cast<int>(row % p.heads);
  int const query = static_cast<int>(row / p.heads % p.seqlen);
  int const batch = static_cast<int>(row / p.heads / p.seqlen);
  float const* const lse = p.lse_partial + offset(p.lse_strides, 0, batch, query, head);
  float const* const parts = p.out_partial + offset(p.out_strides, 0, batch, query, head);

  float most = -INFINITY;
  for (int split = lane; split < p.splits; split += kLanes) {
    most = sm90::max_nan(most, lse[split * p.lse_strides.split]);
  }
  CUTLASS_PRAGMA_UNROLL
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    most = sm90::max_nan(most, __shfl_xor_sync(0xffffffff, most, lanes));
  }
  float const origin = most == -INFINITY ? 0.f : most;
  auto weight_of = [&](int split) {
    return split < p.splits
               ? sm90::exp2_mufu((lse[split * p.lse_strides.split] - origin) * sm90::kLog2e)
               : 0.f;
  };
  float sum = 0.f;
  for (int split = lane; split < p.splits; split += kLanes) sum += weight_of(split);
  CUTLASS_PRAGMA_UNROLL
  for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
  float const inverse = sum == 0.f ? 0.f : 1.f / sum;
  if (lane == 0) {
    p.lse[(int64_t{batch} * p.heads + head) * p.seqlen + query] =
        sum == 0.f ? -INFINITY : most + log2f(sum) * sm90::kLn2;
  }

  auto* const out = static_cast<Element*>(p.out) + row * p.head_dim;
  int const vectors = p.head_dim / kVector;
  for (int first = 0; first < vectors; first += kLanes) {  // the same rounds in all lanes
    int const column = (first + lane) * kVector;
    bool const has_columns = column < p.head_dim;
    cutlass::Array<float, kVector> total;
    total.fill(0.f);
    for (int group = 0; group < p.splits; group += kLanes) {
      float const own = weight_of(group + lane);
      int const count = min(kLanes, p.splits - group);
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        float const weight = __shfl_sync(0xffffffff, own, i);
        if (weight == 0.f || !has_columns) continue;
        Vector const x =
            *reinterpret_cast<Vector const*>(parts + (group + i) * p.out_strides.split + column);
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kVector; ++j) total[j] += weight * x[j];
      }
    }
    if (!has_columns) continue;
    cutlass::AlignedArray<Element, kVector> rounded;
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kVector; ++j) rounded[j] = static_cast<Element>(total[j] * inverse);
    *reinterpret_cast<cutlass::AlignedArray<Element, kVector>*>(out + column) = rounded;
  }
}

template <class Element>
cudaError_t launch(CombineProblem const& p, sm90::Launch const& how) {
  constexpr int kVector = 4;
  auto const& s = p.out_strides;
  bool const aligned = reinterpret_cast<uintptr_t>(p.out_partial) % 16 == 0 &&
                       (p.head_dim | s.split | s.batch | s.seqlen | s.head) % kVector == 0;
  return aligned ? sm90::launch_kernel<combine_kernel<Element, kVector>>(how, p)
                 : sm90::launch_kernel<combine_kernel<Element, 1>>(how, p);
}

}  // namespace

cudaError_t launch_combine(CombineProblem const& p, cudaStream_t stream, int device) {
  sm90::Launch how{};
  how.threads = kThreads;
  how.grid =
      dim3(static_cast<unsigned>((int64_t{p.batch} * p.seqlen * p.heads + kWarps - 1) / kWarps));
  how.stream = stream;
  how.device = device;
  switch (p.type) {
    case CombinedType::kFloat16:
      return launch<cutlass::half_t>(p, how);
    case CombinedType::kBFloat16:
      return launch<cutlass::bfloat16_t>(p, how);
    default:
      return launch<float>(p, how);
  }
}

}  // namespace cute_kernels::attention
