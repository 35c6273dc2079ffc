#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/fp8/quantize_launch.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/fp8_call.hpp"
#include "cute_kernels/torch/fp8_quantize.hpp"
#include "cute_kernels/torch/packed_call.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {
namespace {

using attention::AttentionCall;
using attention::Fp8ForwardKernel;
using attention::ScoreType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// The operators' optional tensor of LSE's shape.
float const* check_score_offset(std::optional<Tensor> const& tensor, Argument const& q,
                                Tensor const& lse) {
  if (!tensor) return nullptr;
  Argument const a("score_offset", *tensor);
  check_device(a, q);
  require(a.dtype == ScalarType::Float && tensor->is_contiguous(),
          "score_offset is not float32 and contiguous");
  require(a.sizes.size() == lse.sizes().size() && tensor->numel() == lse.numel(),
          "score_offset does not have the LSE's shape");
  return static_cast<float const*>(tensor->data_ptr());
}

/// Of a call whose tensors are there, without what is only launched.
Fp8Results attend(AttentionCall call, Fp8Operands const& of, bool out_float16, bool with_lse,
                  std::optional<Tensor> const& sinks_tensor,
                  std::optional<Tensor> const& score_offset, int64_t sm_margin,
                  TileName const& tile) {
  check_fp8_call_values(of.v, call);
  check_fp8_tiles(call);
  hopper(of.q.device);
  torch::stable::accelerator::DeviceGuard const guard(of.q.device);
  Sinks const sinks(sinks_tensor, of.q, call.sizes.heads_q);
  call.sinks = sinks.data();
  Fp8Results const results = empty_fp8_results(call, out_float16, of.q.device);
  float const* const offset = check_score_offset(score_offset, of.q, results.lse);
  if (results.lse.numel() == 0) return results;
  Fp8ForwardKernel const& kernel = fp8_kernel_for(score_type(of.q.dtype), call, tile, with_lse);
  require(offset == nullptr || kernel.config.any_call, "score_offset needs sinks or a window");
  launch_fp8(kernel, call, of, {out_float16, with_lse, false, offset, sm_margin}, results);
  return results;
}

std::tuple<Tensor, Tensor> flash_attn_fp8_forward(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& q_scale, Tensor const& k_scale,
    Tensor const& v_scale, double softmax_scale, bool causal, bool out_float16,
    std::optional<StringHandle> tile_config, std::optional<Tensor> sinks,
    std::optional<Tensor> score_offset, bool with_lse, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, int64_t sm_margin) {
  TileName const tile(tile_config);
  Fp8Operands const of{{"q", q},
                       {"k", k},
                       {"v", v},
                       {"q_scale", q_scale},
                       {"k_scale", k_scale},
                       {"v_scale", v_scale}};
  check_fp8_elements(of, 4);
  AttentionCall const call = call_of(of.q, of.k, of.v.size(2), softmax_scale,
                                     mask_of(causal, window_left, window_right, std::nullopt));
  auto const [out, lse] =
      attend(call, of, out_float16, with_lse, sinks, score_offset, sm_margin, tile);
  return {out, lse};
}

std::tuple<Tensor, Tensor> flash_attn_fp8_varlen_forward(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& q_scale, Tensor const& k_scale,
    Tensor const& v_scale, Tensor const& cu_seqlens_q, Tensor const& cu_seqlens_k,
    std::optional<Tensor> seqused_q, std::optional<Tensor> seqused_k,
    std::optional<Tensor> diagonal, double softmax_scale, bool causal, bool out_float16,
    std::optional<Tensor> sinks, bool with_lse, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, std::optional<StringHandle> tile_config,
    int64_t sm_margin) {
  TileName const tile(tile_config);
  Fp8Operands const of{{"q", q},
                       {"k", k},
                       {"v", v},
                       {"q_scale", q_scale},
                       {"k_scale", k_scale},
                       {"v_scale", v_scale}};
  check_fp8_elements(of, 3);
  PackedCall const packed{cu_seqlens_q, cu_seqlens_k, seqused_q,   seqused_k,
                          diagonal,     max_seqlen_q, max_seqlen_k};
  AttentionCall const call =
      packed_call_of(of.q, of.k, of.v.size(1), softmax_scale,
                     mask_of(causal, window_left, window_right, std::nullopt), packed);
  auto const [out, lse] =
      attend(call, of, out_float16, with_lse, sinks, std::nullopt, sm_margin, tile);
  return {out, lse};
}

/// How 16-bit tensors are quantised.
struct Quantisation {
  bool smooth_k;
  bool incoherent;
  int64_t seed;
  bool to_int8;
};

void check_whole(Argument const& q, Argument const& k, Argument const& v, size_t rank) {
  check_fp8_rows(q, rank);
  check_fp8_rows(k, rank);
  check_fp8_values(v, rank);
  check_16_bits(v);
  check_device(k, q);
  check_device(v, q);
  for (int dim = 0; dim + 1 < static_cast<int>(rank); ++dim) {
    require(v.size(dim) == k.size(dim), "v does not have k's batch, seqlen and heads");
  }
}

/// From 16 bits, of a checked call: all is quantised first, and each kernel starts while the one
/// before it ends.
std::tuple<Tensor, Tensor, Tensor> attend_whole(AttentionCall call, Argument const& q,
                                                Argument const& k, Argument const& v,
                                                Quantisation const& how, bool out_float16,
                                                bool with_lse,
                                                std::optional<Tensor> const& sinks_tensor,
                                                TileName const& tile) {
  check_fp8_tiles(call);
  hopper(q.device);
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Sinks const sinks(sinks_tensor, q, call.sizes.heads_q);
  call.sinks = sinks.data();
  Fp8Rows const q_rows =
      prepare_rows(q, query_rows(call), false, how.incoherent, how.seed, how.to_int8);
  Fp8Rows const k_rows =
      prepare_rows(k, key_rows(call), how.smooth_k, how.incoherent, how.seed, how.to_int8);
  Fp8Values const values = prepare_values(v, key_rows(call));
  Fp8Results const results = empty_fp8_results(call, out_float16, q.device);
  if (results.lse.numel() == 0) return {results.out, results.lse, k_rows.shift};
  ScoreType const type = how.to_int8 ? ScoreType::kInt8 : ScoreType::kE4m3;
  Fp8ForwardKernel const& kernel = fp8_kernel_for(type, call, tile, with_lse);

  fp8::QuantizeProblem problem{};
  problem.key_center = k_rows.key_center;
  problem.value_maximum = values.maximum;
  problem.q = q_rows.problem;
  problem.k = k_rows.problem;
  problem.v = values.problem;
  std::optional<Tensor> offset;
  if (k_rows.key_center && (with_lse || call.sinks != nullptr)) {
    auto const sizes = results.lse.sizes();
    offset = empty(static_cast<int>(sizes.size()), sizes.data(), ScalarType::Float, q.device);
    problem.score_offset = fp8::ScoreOffsetProblem{
        *q_rows.problem, k_rows.key_center->result, call.sizes.heads_q / call.sizes.heads_kv,
        attention::scale_of_fp8_scores(call.scale), static_cast<float*>(offset->data_ptr())};
  }
  float* const data = offset ? static_cast<float*>(offset->data_ptr()) : nullptr;
  cudaStream_t const stream = current_stream(q.device);
  require_success(fp8::launch_quantize(problem, stream), "quantisation");
  Fp8Operands const of{{"q", q_rows.data},        {"k", k_rows.data},
                       {"v", values.data},        {"q_scale", q_rows.scale},
                       {"k_scale", k_rows.scale}, {"v_scale", values.scale}};
  bool const takes_offset = kernel.config.any_call;
  launch_fp8(kernel, call, of,
             {out_float16, with_lse, k_rows.problem.has_value(), takes_offset ? data : nullptr},
             results);
  if (data != nullptr && !takes_offset) {
    require_success(fp8::launch_add(static_cast<float*>(results.lse.data_ptr()), data,
                                    results.lse.numel(), q.device, stream),
                    "the shift's part of the LSE");
  }
  return {results.out, results.lse, k_rows.shift};
}

std::tuple<Tensor, Tensor, Tensor> flash_attn_fp8(Tensor const& q_tensor, Tensor const& k_tensor,
                                                  Tensor const& v_tensor, double softmax_scale,
                                                  bool causal, bool smooth_k, bool incoherent,
                                                  int64_t seed, bool to_int8, bool out_float16,
                                                  bool with_lse, std::optional<Tensor> sinks,
                                                  std::optional<int64_t> window_left,
                                                  std::optional<int64_t> window_right) {
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  check_whole(q, k, v, 4);
  AttentionCall const call = call_of(q, k, v.size(3), softmax_scale,
                                     mask_of(causal, window_left, window_right, std::nullopt));
  return attend_whole(call, q, k, v, {smooth_k, incoherent, seed, to_int8}, out_float16, with_lse,
                      sinks, TileName(std::nullopt));
}

std::tuple<Tensor, Tensor> flash_attn_fp8_varlen(
    Tensor const& q_tensor, Tensor const& k_tensor, Tensor const& v_tensor,
    Tensor const& cu_seqlens_q, Tensor const& cu_seqlens_k, std::optional<Tensor> seqused_q,
    std::optional<Tensor> seqused_k, std::optional<Tensor> diagonal, double softmax_scale,
    bool causal, bool smooth_k, bool incoherent, int64_t seed, bool to_int8, bool out_float16,
    bool with_lse, std::optional<Tensor> sinks, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, std::optional<StringHandle> tile_config) {
  TileName const tile(tile_config);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  check_whole(q, k, v, 3);
  PackedCall const packed{cu_seqlens_q, cu_seqlens_k, seqused_q,   seqused_k,
                          diagonal,     max_seqlen_q, max_seqlen_k};
  AttentionCall const call =
      packed_call_of(q, k, v.size(2), softmax_scale,
                     mask_of(causal, window_left, window_right, std::nullopt), packed);
  auto const [out, lse, shift] = attend_whole(call, q, k, v, {smooth_k, incoherent, seed, to_int8},
                                              out_float16, with_lse, sinks, tile);
  return {out, lse};
}

}  // namespace
}  // namespace cute_kernels::binding

// Of calls of quantised tensors the scores are higher by score_offset, of the LSE's shape, which
// their sinks and the LSE then count in. Without with_lse the LSE may be that of rounded P, and
// from 16 bits that of K less its shift.
STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "flash_attn_fp8_forward(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, "
      "Tensor v_scale, float softmax_scale, bool causal, bool out_float16, "
      "str? tile_config=None, Tensor? sinks=None, Tensor? score_offset=None, *, "
      "bool with_lse=False, SymInt? window_left=None, SymInt? window_right=None, "
      "SymInt sm_margin=0) -> (Tensor out, Tensor lse)");
  library.def(
      "flash_attn_fp8_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, "
      "Tensor v_scale, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, "
      "Tensor? seqused_k, Tensor? diagonal, float softmax_scale, bool causal, bool out_float16, "
      "Tensor? sinks=None, *, bool with_lse=False, SymInt? max_seqlen_q=None, "
      "SymInt? max_seqlen_k=None, SymInt? window_left=None, SymInt? window_right=None, "
      "str? tile_config=None, SymInt sm_margin=0) -> (Tensor out, Tensor lse)");
  library.def(
      "flash_attn_fp8(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, "
      "bool smooth_k, bool incoherent, int seed, bool to_int8, bool out_float16, "
      "bool with_lse=False, Tensor? sinks=None, *, SymInt? window_left=None, "
      "SymInt? window_right=None) -> (Tensor out, Tensor lse, Tensor k_shift)");
  library.def(
      "flash_attn_fp8_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? diagonal, "
      "float softmax_scale, bool causal, bool smooth_k, bool incoherent, int seed, bool to_int8, "
      "bool out_float16, bool with_lse=False, Tensor? sinks=None, *, SymInt? max_seqlen_q=None, "
      "SymInt? max_seqlen_k=None, SymInt? window_left=None, SymInt? window_right=None, "
      "str? tile_config=None) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("flash_attn_fp8_forward", TORCH_BOX(&cute_kernels::binding::flash_attn_fp8_forward));
  library.impl("flash_attn_fp8_varlen_forward",
               TORCH_BOX(&cute_kernels::binding::flash_attn_fp8_varlen_forward));
  library.impl("flash_attn_fp8", TORCH_BOX(&cute_kernels::binding::flash_attn_fp8));
  library.impl("flash_attn_fp8_varlen", TORCH_BOX(&cute_kernels::binding::flash_attn_fp8_varlen));
}
