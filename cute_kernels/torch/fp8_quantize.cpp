#include "cute_kernels/torch/fp8_quantize.hpp"

#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/fp8/quantize_launch.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/packed_call.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {

using fp8::InputType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_fp8_tensor(Argument const& a, size_t rank) {
  require(a.is_cuda, a.name, " is not on CUDA");
  require(a.sizes.size() == rank, a.name, " does not have ", rank, " dimensions");
  for (int64_t size : a.sizes) require(size < kFp8Limit, a.name, " has a size of 2^30 or more");
  int const last = static_cast<int>(rank) - 1;
  require(a.stride(last) == 1 || a.size(last) <= 1, a.name, "'s last dimension is not contiguous");
}

void check_fp8_head_dim(Argument const& a, int64_t head_dim) {
  require(head_dim % 16 == 0 && head_dim > 0 && head_dim <= fp8::kMaxHeadDim, a.name,
          "'s head_dim is not a multiple of 16 up to ", fp8::kMaxHeadDim);
}

void check_16_bits(Argument const& a) {
  require(a.dtype == ScalarType::Half || a.dtype == ScalarType::BFloat16, a.name,
          " is not float16 or bfloat16");
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

SourceRows query_rows(attention::AttentionCall const& call) {
  return {call.sizes.batch, call.packed.cu_seqlens_q, call.packed.seqused_q};
}

SourceRows key_rows(attention::AttentionCall const& call) {
  return {call.sizes.batch, call.packed.cu_seqlens_k, call.packed.seqused_k};
}

namespace {

/// The sizes of (batch, seqlen, heads, head_dim), or of a packed (seqlen, heads, head_dim).
struct Sizes {
  int64_t batch;
  int64_t seqlen;
  int64_t heads;
  int64_t head_dim;

  Sizes(Argument const& a, SourceRows const& rows) {
    int const rank = static_cast<int>(a.sizes.size());
    batch = rows.batch;
    seqlen = a.size(rank - 3);
    heads = a.size(rank - 2);
    head_dim = a.size(rank - 1);
  }

  bool is_empty() const { return batch == 0 || seqlen == 0 || heads == 0; }
};

/// `readable`: a's elements where a kernel can read them.
fp8::Source source(Argument const& a, SourceRows const& rows, Tensor const& readable) {
  InputType const type = a.dtype == ScalarType::Float8_e4m3fn ? InputType::kE4m3
                         : a.dtype == ScalarType::Half        ? InputType::kFloat16
                                                              : InputType::kBFloat16;
  Sizes const sizes(a, rows);
  return {type,
          static_cast<int>(sizes.batch),
          static_cast<int>(sizes.seqlen),
          static_cast<int>(sizes.heads),
          static_cast<int>(sizes.head_dim),
          view(readable),
          rows.cu_seqlens,
          rows.seqused};
}

SourceRows dense_rows(Argument const& a) { return {a.size(0)}; }

}  // namespace

void check_fp8_rows(Argument const& x, size_t rank) {
  check_fp8_tensor(x, rank);
  check_16_bits(x);
  check_fp8_head_dim(x, x.size(static_cast<int>(rank) - 1));
}

void check_fp8_values(Argument const& v, size_t rank) {
  check_fp8_tensor(v, rank);
  if (v.dtype != ScalarType::Float8_e4m3fn) check_16_bits(v);
  check_fp8_head_dim(v, v.size(static_cast<int>(rank) - 1));
}

Fp8Rows prepare_rows(Argument const& x, SourceRows const& rows, bool smooth, bool incoherent,
                     int64_t seed, bool to_int8) {
  Sizes const sizes(x, rows);
  int64_t const blocks = rows.is_packed()
                             ? attention::blocks_of_all(sizes.seqlen, sizes.batch, fp8::kBlockRows)
                             : blocks_of(sizes.seqlen, fp8::kBlockRows);
  Fp8Rows result{
      empty(static_cast<int>(x.sizes.size()), x.sizes.data(),
            to_int8 ? ScalarType::Char : ScalarType::Float8_e4m3fn, x.device),
      empty({rows.is_packed() ? 1 : sizes.batch, sizes.heads, blocks}, ScalarType::Float, x.device),
      empty({sizes.batch, sizes.heads, smooth ? sizes.head_dim : 0}, ScalarType::Float, x.device),
      tma_readable(x, 2),
      std::nullopt,
      std::nullopt};
  if (sizes.is_empty()) {
    torch::stable::zero_(result.shift);
    return result;
  }
  float* const shift = smooth ? static_cast<float*>(result.shift.data_ptr()) : nullptr;
  fp8::Source const from = source(x, rows, result.readable);
  result.problem = fp8::QuantizeRowsProblem{from,
                                            to_int8,
                                            result.data.data_ptr(),
                                            static_cast<float*>(result.scale.data_ptr()),
                                            shift,
                                            incoherent,
                                            fp8::random_signs(static_cast<uint64_t>(seed))};
  if (smooth) result.key_center = fp8::SampleProblem{from, shift, nullptr};
  return result;
}

Fp8Values prepare_values(Argument const& v, SourceRows const& rows) {
  bool const moved = v.dtype == ScalarType::Float8_e4m3fn;
  Sizes const sizes(v, rows);
  int64_t const padded = rows.is_packed() ? attention::packed_value_keys(sizes.seqlen, sizes.batch)
                                          : blocks_of(sizes.seqlen, kKeyPadding) * kKeyPadding;
  require(!rows.is_packed() || padded < kFp8Limit, v.name, "'s sequences have 2^30 keys or more");
  int64_t const shape[] = {sizes.batch, sizes.heads, sizes.head_dim, padded};
  int64_t const pairs = sizes.batch * sizes.heads;
  int const first = rows.is_packed() ? 1 : 0;
  Fp8Values result{
      empty(4 - first, shape + first, ScalarType::Float8_e4m3fn, v.device),
      empty({sizes.batch, sizes.heads, moved ? 0 : sizes.head_dim}, ScalarType::Float, v.device),
      empty({moved ? 0 : pairs * (sizes.head_dim + 1)}, ScalarType::Float, v.device),
      tma_readable(v, moved ? 1 : 2),
      std::nullopt,
      std::nullopt};
  if (sizes.is_empty()) return result;
  fp8::Source const from = source(v, rows, result.readable);
  float* const maximum = moved ? nullptr : static_cast<float*>(result.scratch.data_ptr());
  int* const overflowed =
      moved ? nullptr : reinterpret_cast<int*>(maximum + pairs * sizes.head_dim);
  result.problem = fp8::QuantizeValuesProblem{from, result.data.data_ptr(), maximum, overflowed,
                                              static_cast<float*>(result.scale.data_ptr())};
  if (!moved) result.maximum = fp8::SampleProblem{from, maximum, overflowed};
  return result;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_rows(Tensor const& x_tensor, bool smooth,
                                                 bool incoherent, int64_t seed, bool to_int8) {
  Argument const x("x", x_tensor);
  check_fp8_rows(x, 4);
  hopper(x.device);
  torch::stable::accelerator::DeviceGuard const guard(x.device);
  Fp8Rows const rows = prepare_rows(x, dense_rows(x), smooth, incoherent, seed, to_int8);
  fp8::QuantizeProblem problem{};
  problem.key_center = rows.key_center;
  problem.q = rows.problem;
  require_success(fp8::launch_quantize(problem, current_stream(x.device)), "quantize_fp8_rows");
  return {rows.data, rows.scale, rows.shift};
}

std::tuple<Tensor, Tensor> values_of(Argument const& v, SourceRows const& rows) {
  hopper(v.device);
  torch::stable::accelerator::DeviceGuard const guard(v.device);
  Fp8Values const values = prepare_values(v, rows);
  fp8::QuantizeProblem problem{};
  problem.value_maximum = values.maximum;
  problem.v = values.problem;
  require_success(fp8::launch_quantize(problem, current_stream(v.device)), "quantize_fp8_values");
  return {values.data, values.scale};
}

std::tuple<Tensor, Tensor> quantize_values(Tensor const& v_tensor) {
  Argument const v("v", v_tensor);
  check_fp8_values(v, 4);
  return values_of(v, dense_rows(v));
}

std::tuple<Tensor, Tensor> quantize_varlen_values(Tensor const& v_tensor, Tensor const& cu_seqlens,
                                                  std::optional<Tensor> seqused) {
  Argument const v("v", v_tensor);
  check_fp8_values(v, 3);
  int64_t const starts = cu_seqlens.numel();
  require(starts > 0 && starts < kFp8Limit, "cu_seqlens does not have batch + 1 elements");
  return values_of(v, {starts - 1, check_int32("cu_seqlens", cu_seqlens, v, starts),
                       seqused ? check_int32("seqused", *seqused, v, starts - 1) : nullptr});
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "quantize_fp8_rows(Tensor x, bool smooth, bool incoherent, int seed, bool to_int8) -> "
      "(Tensor data, Tensor scale, Tensor shift)");
  library.def("quantize_fp8_values(Tensor v) -> (Tensor data, Tensor scale)");
  library.def(
      "quantize_fp8_varlen_values(Tensor v, Tensor cu_seqlens, Tensor? seqused) -> "
      "(Tensor data, Tensor scale)");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("quantize_fp8_rows", TORCH_BOX(&cute_kernels::binding::quantize_rows));
  library.impl("quantize_fp8_values", TORCH_BOX(&cute_kernels::binding::quantize_values));
  library.impl("quantize_fp8_varlen_values",
               TORCH_BOX(&cute_kernels::binding::quantize_varlen_values));
}
