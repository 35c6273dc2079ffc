#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/fp8_tile_config.hpp"
#include "cute_kernels/fp8/quantize_launch.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/measured_choice.hpp"
#include "cute_kernels/torch/require.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {
namespace {

using attention::AttentionCall;
using attention::CallSizes;
using attention::Fp8ForwardKernel;
using attention::Fp8ForwardProblem;
using attention::ScaleView;
using attention::ScoreType;
using fp8::InputType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What is refused here is refused in few words: Python's fp8/checks.py then says what is wrong.
constexpr int64_t kLimit = 1 << 30;  // of each size, and of the tiles of a call
constexpr int kKeyPadding = 16;      // V's keys are padded to a multiple of it

void check_tensor(Argument const& a, int rank) {
  require(a.is_cuda, a.name, " is not on CUDA");
  require(static_cast<int>(a.sizes.size()) == rank, a.name, " does not have ", rank, " dimensions");
  for (int64_t size : a.sizes) require(size < kLimit, a.name, " has a size of 2^30 or more");
  require(a.stride(rank - 1) == 1 || a.size(rank - 1) <= 1, a.name,
          "'s last dimension is not contiguous");
}

void check_head_dim(Argument const& a, int64_t head_dim) {
  require(head_dim % 16 == 0 && head_dim > 0 && head_dim <= fp8::kMaxHeadDim, a.name,
          "'s head_dim is not a multiple of 16 up to ", fp8::kMaxHeadDim);
}

void check_16_bits(Argument const& a) {
  require(a.dtype == ScalarType::Half || a.dtype == ScalarType::BFloat16, a.name,
          " is not float16 or bfloat16");
}

/// `readable`: a's elements where a kernel can read them.
fp8::Source source(Argument const& a, Tensor const& readable) {
  InputType const type = a.dtype == ScalarType::Float8_e4m3fn ? InputType::kE4m3
                         : a.dtype == ScalarType::Half        ? InputType::kFloat16
                                                              : InputType::kBFloat16;
  return {type,
          static_cast<int>(a.size(0)),
          static_cast<int>(a.size(1)),
          static_cast<int>(a.size(2)),
          static_cast<int>(a.size(3)),
          view(readable)};
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

/// Results that are not computed yet, and the tensors that live until they are.
struct Rows {
  Tensor data;
  Tensor scale;
  Tensor shift;
  Tensor readable;
  std::optional<fp8::SampleProblem> key_center;
  std::optional<fp8::QuantizeRowsProblem> problem;
};

struct Values {
  Tensor data;
  Tensor scale;
  Tensor scratch;
  Tensor readable;
  std::optional<fp8::SampleProblem> maximum;
  std::optional<fp8::QuantizeValuesProblem> problem;
};

void check_rows(Argument const& x) {
  check_tensor(x, 4);
  check_16_bits(x);
  int64_t const head_dim = x.size(3);
  require(head_dim == 64 || head_dim == 128 || head_dim == 256, x.name,
          "'s head_dim is not 64, 128 or 256");
}

void check_values(Argument const& v) {
  check_tensor(v, 4);
  if (v.dtype != ScalarType::Float8_e4m3fn) check_16_bits(v);
  check_head_dim(v, v.size(3));
}

/// Q or K. With smooth, what most rows have in common is subtracted from all.
Rows prepare_rows(Argument const& x, bool smooth, bool incoherent, int64_t seed, bool to_int8) {
  int64_t const batch = x.size(0), seqlen = x.size(1), heads = x.size(2), head_dim = x.size(3);
  int64_t const blocks = blocks_of(seqlen, fp8::kBlockRows);
  Rows rows{empty({batch, seqlen, heads, head_dim},
                  to_int8 ? ScalarType::Char : ScalarType::Float8_e4m3fn, x.device),
            empty({batch, heads, blocks}, ScalarType::Float, x.device),
            empty({batch, heads, smooth ? head_dim : 0}, ScalarType::Float, x.device),
            tma_readable(x, 2),
            std::nullopt,
            std::nullopt};
  if (batch == 0 || seqlen == 0 || heads == 0) return rows;
  float* const shift = smooth ? static_cast<float*>(rows.shift.data_ptr()) : nullptr;
  fp8::Source const from = source(x, rows.readable);
  rows.problem = fp8::QuantizeRowsProblem{from,
                                          to_int8,
                                          rows.data.data_ptr(),
                                          static_cast<float*>(rows.scale.data_ptr()),
                                          shift,
                                          incoherent,
                                          fp8::random_signs(static_cast<uint64_t>(seed))};
  if (smooth) rows.key_center = fp8::SampleProblem{from, shift, nullptr};
  return rows;
}

/// V as the attention kernel reads it: (batch, heads, head_dim, keys padded), and the scales of its
/// channels (none if V comes in e4m3).
Values prepare_values(Argument const& v) {
  bool const moved = v.dtype == ScalarType::Float8_e4m3fn;
  int64_t const batch = v.size(0), seqlen = v.size(1), heads = v.size(2), head_dim = v.size(3);
  int64_t const padded = blocks_of(seqlen, kKeyPadding) * kKeyPadding;
  int64_t const pairs = batch * heads;
  Values values{empty({batch, heads, head_dim, padded}, ScalarType::Float8_e4m3fn, v.device),
                empty({batch, heads, moved ? 0 : head_dim}, ScalarType::Float, v.device),
                empty({moved ? 0 : pairs * (head_dim + 1)}, ScalarType::Float, v.device),
                tma_readable(v, moved ? 1 : 2),
                std::nullopt,
                std::nullopt};
  if (batch == 0 || seqlen == 0 || heads == 0) return values;
  fp8::Source const from = source(v, values.readable);
  float* const maximum = static_cast<float*>(values.scratch.data_ptr());
  int* const overflowed = moved ? nullptr : reinterpret_cast<int*>(maximum + pairs * head_dim);
  values.problem = fp8::QuantizeValuesProblem{from, values.data.data_ptr(), maximum, overflowed,
                                              static_cast<float*>(values.scale.data_ptr())};
  if (!moved) values.maximum = fp8::SampleProblem{from, maximum, overflowed};
  return values;
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows(Tensor const& x_tensor, bool smooth,
                                                 bool incoherent, int64_t seed, bool to_int8) {
  Argument const x("x", x_tensor);
  check_rows(x);
  hopper(x.device);
  torch::stable::accelerator::DeviceGuard const guard(x.device);
  Rows const rows = prepare_rows(x, smooth, incoherent, seed, to_int8);
  require_success(fp8::launch_quantize(
                      {rows.key_center, std::nullopt, rows.problem, std::nullopt, std::nullopt},
                      current_stream(x.device)),
                  "quantize_fp8_rows");
  return {rows.data, rows.scale, rows.shift};
}

std::tuple<Tensor, Tensor> quantize_values(Tensor const& v_tensor) {
  Argument const v("v", v_tensor);
  check_values(v);
  hopper(v.device);
  torch::stable::accelerator::DeviceGuard const guard(v.device);
  Values const values = prepare_values(v);
  require_success(fp8::launch_quantize(
                      {std::nullopt, values.maximum, std::nullopt, std::nullopt, values.problem},
                      current_stream(v.device)),
                  "quantize_fp8_values");
  return {values.data, values.scale};
}

/// Scales that may be expanded; `blocks` is how many a (batch, head) pair needs at least.
ScaleView scale_view(Argument const& a, Argument const& q, int64_t batch, int64_t heads,
                     int64_t blocks) {
  check_tensor(a, 3);
  check_device(a, q);
  require(a.dtype == ScalarType::Float, a.name, " is not float32");
  bool const one = a.size(2) == 1;
  require(a.size(0) == batch && a.size(1) == heads && (one || a.size(2) == blocks), a.name,
          "'s shape does not fit");
  return {static_cast<float const*>(a.tensor.data_ptr()), a.stride(0), a.stride(1), one ? 0 : 1};
}

/// With `overlaps`, right behind the kernels that quantise the operands.
std::tuple<Tensor, Tensor> attend(Tensor const& q_tensor, Tensor const& k_tensor,
                                  Tensor const& v_tensor, Tensor const& q_scale_tensor,
                                  Tensor const& k_scale_tensor, Tensor const& v_scale_tensor,
                                  double softmax_scale, bool causal, bool out_float16,
                                  bool overlaps, TileName const& tile) {
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  Argument const q_scale("q_scale", q_scale_tensor), k_scale("k_scale", k_scale_tensor),
      v_scale("v_scale", v_scale_tensor);
  for (Argument const* a : {&q, &k, &v}) {
    check_tensor(*a, 4);
    check_device(*a, q);
  }
  require(q.dtype == ScalarType::Float8_e4m3fn || q.dtype == ScalarType::Char,
          "q is not float8_e4m3fn or int8");
  require(k.dtype == q.dtype, "k does not have q's dtype");
  require(v.dtype == ScalarType::Float8_e4m3fn, "v is not float8_e4m3fn");
  check_head_dim(q, q.size(3));
  AttentionCall const call = call_of(q, k, v.size(2), softmax_scale, attention::mask_spec(causal));
  CallSizes const& sizes = call.sizes;
  int64_t const padded = blocks_of(sizes.seqlen_k, kKeyPadding) * kKeyPadding;
  require(v.size(0) == sizes.batch && v.size(1) == sizes.heads_kv &&
              sizes.head_dim_v == sizes.head_dim && v.size(3) == padded && v.tensor.is_contiguous(),
          "v is not what quantize_fp8_values gives for k's shape");
  int64_t const query_blocks = blocks_of(sizes.seqlen_q, fp8::kBlockRows);
  require(static_cast<double>(sizes.batch) * sizes.heads_q * query_blocks < kLimit,
          "q has 2^30 blocks of rows or more");
  attention::Device const& device = hopper(q.device);

  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Tensor out = empty({sizes.batch, sizes.seqlen_q, sizes.heads_q, sizes.head_dim_v},
                     out_float16 ? ScalarType::Half : ScalarType::BFloat16, q.device);
  Tensor lse = empty({sizes.batch, sizes.heads_q, sizes.seqlen_q}, ScalarType::Float, q.device);
  if (sizes.batch == 0 || sizes.heads_q == 0 || sizes.seqlen_q == 0) return {out, lse};
  ScoreType const type = score_type(q.dtype);
  auto const& kernels = attention::fp8_forward_kernels;
  auto const choose = [&] { return automatic_choice(kernels, type, call); };
  Fp8ForwardKernel const& kernel = kernel_for(kernels, choose, type, call, tile);

  bool const has_keys = sizes.seqlen_k > 0;
  Tensor const q_readable = tma_readable(q, 1);
  Tensor const k_readable =
      has_keys ? tma_readable(k, 1) : out;  // without keys nothing is read, an address is needed
  Fp8ForwardProblem problem{};
  problem.call = call;
  problem.q = view(q_readable);
  problem.k = view(k_readable);
  problem.v = {out.data_ptr(), kKeyPadding, kKeyPadding, kKeyPadding};
  if (has_keys) problem.v = {v.tensor.data_ptr(), v.stride(0), padded, v.stride(1)};
  problem.out = view(out);
  problem.lse = static_cast<float*>(lse.data_ptr());
  problem.device = device;
  problem.out_float16 = out_float16;
  problem.overlaps = overlaps;
  problem.q_scale = scale_view(q_scale, q, sizes.batch, sizes.heads_q, query_blocks);
  problem.k_scale = scale_view(k_scale, q, sizes.batch, sizes.heads_kv,
                               blocks_of(sizes.seqlen_k, fp8::kBlockRows));
  problem.v_scale = scale_view(v_scale, q, sizes.batch, sizes.heads_kv, sizes.head_dim_v);
  require_success(kernel.launch(problem, current_stream(q.device)), kernel.config.name);
  return {out, lse};
}

std::tuple<Tensor, Tensor> flash_attn_fp8_forward(Tensor const& q, Tensor const& k, Tensor const& v,
                                                  Tensor const& q_scale, Tensor const& k_scale,
                                                  Tensor const& v_scale, double softmax_scale,
                                                  bool causal, bool out_float16,
                                                  std::optional<StringHandle> tile_config) {
  TileName const tile(tile_config);
  return attend(q, k, v, q_scale, k_scale, v_scale, softmax_scale, causal, out_float16, false,
                tile);
}

/// From 16 bits: all is quantised first, and each kernel starts while the one before it ends.
std::tuple<Tensor, Tensor, Tensor> flash_attn_fp8(Tensor const& q_tensor, Tensor const& k_tensor,
                                                  Tensor const& v_tensor, double softmax_scale,
                                                  bool causal, bool smooth_k, bool incoherent,
                                                  int64_t seed, bool to_int8, bool out_float16) {
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  check_rows(q);
  check_rows(k);
  check_values(v);
  check_16_bits(v);
  check_device(k, q);
  check_device(v, q);
  require(v.size(1) == k.size(1), "v has seqlen ", v.size(1), ", must be ", k.size(1), " like k");
  hopper(q.device);
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Rows const q_rows = prepare_rows(q, false, incoherent, seed, to_int8);
  Rows const k_rows = prepare_rows(k, smooth_k, incoherent, seed, to_int8);
  Values const values = prepare_values(v);
  require_success(fp8::launch_quantize({k_rows.key_center, values.maximum, q_rows.problem,
                                        k_rows.problem, values.problem},
                                       current_stream(q.device)),
                  "flash_attn_fp8");
  auto [out, lse] = attend(q_rows.data, k_rows.data, values.data, q_rows.scale, k_rows.scale,
                           values.scale, softmax_scale, causal, out_float16,
                           k_rows.problem.has_value(), TileName(std::nullopt));
  return {out, lse, k_rows.shift};
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "quantize_fp8_rows(Tensor x, bool smooth, bool incoherent, int seed, bool to_int8) -> "
      "(Tensor data, Tensor scale, Tensor shift)");
  library.def("quantize_fp8_values(Tensor v) -> (Tensor data, Tensor scale)");
  library.def(
      "flash_attn_fp8_forward(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, "
      "Tensor v_scale, float softmax_scale, bool causal, bool out_float16, "
      "str? tile_config=None) -> (Tensor out, Tensor lse)");
  library.def(
      "flash_attn_fp8(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, "
      "bool smooth_k, bool incoherent, int seed, bool to_int8, bool out_float16) -> "
      "(Tensor out, Tensor lse, Tensor k_shift)");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("quantize_fp8_rows", TORCH_BOX(&cute_kernels::binding::quantize_rows));
  library.impl("quantize_fp8_values", TORCH_BOX(&cute_kernels::binding::quantize_values));
  library.impl("flash_attn_fp8_forward", TORCH_BOX(&cute_kernels::binding::flash_attn_fp8_forward));
  library.impl("flash_attn_fp8", TORCH_BOX(&cute_kernels::binding::flash_attn_fp8));
}
