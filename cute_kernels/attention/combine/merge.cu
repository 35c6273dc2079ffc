#include <algorithm>

#include <cutlass/array.h>
#include <cutlass/fast_math.h>
#include <cutlass/numeric_conversion.h>

#include "cute_kernels/attention/combine/merge.hpp"
#include "cute_kernels/sm90/launch.hpp"
#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {
namespace {

constexpr int kThreads = 256;

/// Some neighbouring lanes of a warp have a row.
struct RowsOfCtas {
  int rows;
  int lanes;  // of a row, a power of two
  cutlass::FastDivmod seqlen;
  cutlass::FastDivmod heads;

  struct Place {
    int batch;
    int query;
    int head;

    CUTLASS_DEVICE int64_t offset(TensorView const& view) const {
      return batch * view.batch_stride + query * view.seqlen_stride + head * view.head_stride;
    }
  };

  RowsOfCtas(int batch, int seqlen, int heads, int vectors)
      : rows(batch * seqlen * heads), lanes(1), seqlen(seqlen), heads(heads) {
    while (lanes < 32 && lanes < vectors) lanes *= 2;
  }

  CUTLASS_DEVICE int lane() const { return threadIdx.x % lanes; }
  CUTLASS_DEVICE int64_t row() const {
    return int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  }
  CUTLASS_DEVICE Place place(int row) const {
    Place place;
    seqlen(place.batch, place.query, heads.divmod(place.head, row));
    return place;
  }

  sm90::Launch launch(cudaStream_t stream, int device) const {
    int const of_cta = kThreads / lanes;
    sm90::Launch how{};
    how.threads = kThreads;
    how.grid = dim3(static_cast<unsigned>((int64_t{rows} + of_cta - 1) / of_cta));
    how.stream = stream;
    how.device = device;
    return how;
  }
};

template <int kVector>
using Floats = cutlass::Array<float, kVector>;

template <class Element, int kVector>
using Vector =
    cutlass::AlignedArray<Element, kVector, std::min<int>(16, kVector * sizeof(Element))>;

/// Which type a tensor has is the same for all threads, and costs nothing beside memory.
template <int kVector>
CUTLASS_DEVICE Floats<kVector> load(PartialResult const& from, int64_t at) {
  auto widened = [&](auto type) {
    using Element = decltype(type);
    cutlass::NumericArrayConverter<float, Element, kVector> widen;
    auto const* const elements = static_cast<Element const*>(from.out.data) + at;
    return widen(*reinterpret_cast<Vector<Element, kVector> const*>(elements));
  };
  if (from.type == CombinedType::kFloat32) return widened(float{});
  return from.type == CombinedType::kFloat16 ? widened(cutlass::half_t{})
                                             : widened(cutlass::bfloat16_t{});
}

template <int kVector>
CUTLASS_DEVICE void store(PartialResult const& to, int64_t at, Floats<kVector> const& values) {
  auto rounded = [&](auto type) {
    using Element = decltype(type);
    Vector<Element, kVector> vector;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; ++i) vector[i] = static_cast<Element>(values[i]);
    auto* const elements = static_cast<Element*>(to.out.data) + at;
    *reinterpret_cast<Vector<Element, kVector>*>(elements) = vector;
  };
  if (to.type == CombinedType::kFloat32) return rounded(float{});
  if (to.type == CombinedType::kFloat16) return rounded(cutlass::half_t{});
  rounded(cutlass::bfloat16_t{});
}

/// What is multiplied by 0 may be NaN.
template <int kVector>
CUTLASS_DEVICE void add(Floats<kVector>& sum, float weight, Floats<kVector> const& values) {
  if (weight == 0.f) return;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) sum[i] += weight * values[i];
}

template <int kVector>
__global__ void __launch_bounds__(kThreads) merge_kernel(MergeProblem const p, RowsOfCtas const r) {
  int64_t const row = r.row();
  bool const is_row = row < r.rows;
  auto const place = r.place(is_row ? static_cast<int>(row) : 0);
  auto lse_of = [&](PartialResult const& part) {
    return static_cast<float const*>(part.lse.data)[place.offset(part.lse)];
  };
  float const first = lse_of(p.first), second = lse_of(p.second);
  __syncwarp();  // before one lane writes what all have read
  if (!is_row || (p.in_place && second == -INFINITY)) return;

  float const most = sm90::max_nan(first, second);
  float const origin = most == -INFINITY ? 0.f : most;
  float const weight_first = sm90::exp2_mufu((first - origin) * sm90::kLog2e);
  float const weight_second = sm90::exp2_mufu((second - origin) * sm90::kLog2e);
  float const sum = weight_first + weight_second;
  float const inverse = sum == 0.f ? 0.f : 1.f / sum;
  if (r.lane() == 0) {
    static_cast<float*>(p.merged.lse.data)[place.offset(p.merged.lse)] =
        sum == 0.f ? -INFINITY : most + log2f(sum) * sm90::kLn2;
  }
  for (int column = r.lane() * kVector; column < p.head_dim; column += r.lanes * kVector) {
    auto const a = load<kVector>(p.first, place.offset(p.first.out) + column);
    auto const b = load<kVector>(p.second, place.offset(p.second.out) + column);
    Floats<kVector> merged;
    merged.fill(0.f);
    add<kVector>(merged, weight_first * inverse, a);
    add<kVector>(merged, weight_second * inverse, b);
    store<kVector>(p.merged, place.offset(p.merged.out) + column, merged);
  }
}

__global__ void __launch_bounds__(kThreads) add_kernel(AddProblem const p, RowsOfCtas const r) {
  int64_t const row = r.row();
  if (row >= r.rows) return;
  auto const place = r.place(static_cast<int>(row));
  auto* const sums = static_cast<float*>(p.sum.data) + place.offset(p.sum);
  auto const* const terms = static_cast<float const*>(p.term.data) + place.offset(p.term);
  for (int column = r.lane() * 4; column < p.head_dim; column += r.lanes * 4) {
    float4& sum = *reinterpret_cast<float4*>(sums + column);
    float4 const term = *reinterpret_cast<float4 const*>(terms + column);
    sum = make_float4(sum.x + term.x, sum.y + term.y, sum.z + term.z, sum.w + term.w);
  }
}

bool has_vectors(PartialResult const& part) {
  int const bytes = part.type == CombinedType::kFloat32 ? 4 : 2;
  TensorView const& v = part.out;
  int64_t const strides = v.batch_stride | v.seqlen_stride | v.head_stride;
  return (reinterpret_cast<int64_t>(v.data) | strides * bytes) % 16 == 0;
}

}  // namespace

cudaError_t launch_merge(MergeProblem const& p, cudaStream_t stream, int device) {
  constexpr int kVector = 8;
  if (has_vectors(p.first) && has_vectors(p.second) && has_vectors(p.merged)) {
    RowsOfCtas const rows(p.batch, p.seqlen, p.heads, p.head_dim / kVector);
    return sm90::launch_kernel<merge_kernel<kVector>>(rows.launch(stream, device), p, rows);
  }
  RowsOfCtas const rows(p.batch, p.seqlen, p.heads, p.head_dim);
  return sm90::launch_kernel<merge_kernel<1>>(rows.launch(stream, device), p, rows);
}

cudaError_t launch_add(AddProblem const& p, cudaStream_t stream, int device) {
  RowsOfCtas const rows(p.batch, p.seqlen, p.heads, p.head_dim / 4);
  return sm90::launch_kernel<add_kernel>(rows.launch(stream, device), p, rows);
}

}  // namespace cute_kernels::attention
