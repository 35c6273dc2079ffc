#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/fp8_tile_config.hpp"
#include "cute_kernels/attention/schedule/work_list.hpp"
#include "cute_kernels/fp8/quantize_launch.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/fp8_quantize.hpp"
#include "cute_kernels/torch/measured_choice.hpp"
#include "cute_kernels/torch/packed_call.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {
namespace {

using attention::AttentionCall;
using attention::CallSizes;
using attention::Fp8ForwardKernel;
using attention::Fp8ForwardProblem;
using attention::ScaleView;
using attention::ScoreType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// `with_lse`: one whose LSE is exact.
Fp8ForwardKernel const& kernel_of(ScoreType type, AttentionCall const& call, TileName const& tile,
                                  bool with_lse) {
  auto const& kernels = attention::fp8_forward_kernels;
  auto const choose = [&] {
    Fp8ForwardKernel const* const usual = automatic_choice(kernels, type, call);
    if (!with_lse || usual == nullptr || usual->config.any_call || !usual->config.linear_exp) {
      return usual;
    }
    Fp8ForwardKernel const* const exact = attention::choose_fitting(kernels, type, call, true);
    return exact == nullptr ? usual : exact;
  };
  return kernel_for(kernels, choose, type, call, tile);
}

struct Results {
  Tensor out;
  Tensor lse;
};

/// Not initialised, of a call that was checked.
Results empty_results(AttentionCall const& call, bool out_float16, int device) {
  CallSizes const& sizes = call.sizes;
  ScalarType const dtype = out_float16 ? ScalarType::Half : ScalarType::BFloat16;
  int64_t const rows = attention::tensor_rows_q(call);
  if (call.is_packed()) {
    return {empty({rows, sizes.heads_q, sizes.head_dim_v}, dtype, device),
            empty({sizes.heads_q, rows}, ScalarType::Float, device)};
  }
  return {empty({sizes.batch, rows, sizes.heads_q, sizes.head_dim_v}, dtype, device),
          empty({sizes.batch, sizes.heads_q, rows}, ScalarType::Float, device)};
}

/// Quantised tensors and their scales, as the operators have them.
struct Operands {
  Argument q;
  Argument k;
  Argument v;
  Argument q_scale;
  Argument k_scale;
  Argument v_scale;
};

void check_elements(Operands const& of, size_t rank) {
  for (Argument const* a : {&of.q, &of.k}) check_fp8_tensor(*a, rank);
  check_fp8_tensor(of.v, rank);
  for (Argument const* a : {&of.k, &of.v}) check_device(*a, of.q);
  require(of.q.dtype == ScalarType::Float8_e4m3fn || of.q.dtype == ScalarType::Char,
          "q is not float8_e4m3fn or int8");
  require(of.k.dtype == of.q.dtype, "k does not have q's dtype");
  require(of.v.dtype == ScalarType::Float8_e4m3fn, "v is not float8_e4m3fn");
  check_fp8_head_dim(of.q, of.q.size(static_cast<int>(rank) - 1));
}

/// V is what the quantiser makes of the call's.
void check_values(Argument const& v, AttentionCall const& call) {
  int const last = static_cast<int>(v.sizes.size()) - 1;
  int64_t const rows = attention::tensor_rows_k(call);
  int64_t const padded = call.is_packed() ? attention::packed_value_keys(rows, call.sizes.batch)
                                          : blocks_of(rows, kKeyPadding) * kKeyPadding;
  require(v.size(last - 2) == call.sizes.heads_kv && v.size(last) == padded &&
              (call.is_packed() || v.size(0) == call.sizes.batch) && v.tensor.is_contiguous(),
          "v is not what quantize_fp8_values gives for k's shape");
  check_fp8_head_dim(v, v.size(last - 1));
}

/// Scales that may be expanded: of each batch entry or sequence `blocks`, or one. Of packed
/// sequences `blocks` are of all, in one entry.
ScaleView scale_view(Argument const& a, Argument const& q, int64_t batch, int64_t heads,
                     int64_t blocks, bool of_all = false) {
  check_fp8_tensor(a, 3);
  check_device(a, q);
  require(a.dtype == ScalarType::Float, a.name, " is not float32");
  bool const one = a.size(2) == 1 && a.size(0) == batch;
  bool const all = a.size(2) == blocks && a.size(0) == (of_all ? 1 : batch);
  require(a.size(1) == heads && (one || all), a.name, "'s shape does not fit");
  return {static_cast<float const*>(a.tensor.data_ptr()), of_all && !one ? 0 : a.stride(0),
          a.stride(1), one ? 0 : 1};
}

/// What is not a quantised tensor.
struct Options {
  bool out_float16;
  bool exact_lse;
  bool overlaps = false;  // it comes right behind the kernels that quantise the operands
  float const* score_offset = nullptr;
  int64_t sm_margin = 0;
};

void launch(Fp8ForwardKernel const& kernel, AttentionCall const& call, Operands const& of,
            Options const& options, Results const& results) {
  CallSizes const& sizes = call.sizes;
  attention::Device const device = hopper(of.q.device, options.sm_margin);
  bool const packed = call.is_packed();
  int64_t const rows_q = attention::tensor_rows_q(call), rows_k = attention::tensor_rows_k(call);
  bool const has_keys = rows_k > 0 && of.v.tensor.numel() > 0;
  Tensor const q_readable = tma_readable(of.q, 1);
  Tensor const k_readable =
      has_keys ? tma_readable(of.k, 1) : results.out;  // nothing is read, an address is needed
  Fp8ForwardProblem problem{};
  problem.call = call;
  problem.q = view(q_readable);
  problem.k = view(k_readable);
  problem.v = {results.out.data_ptr(), kKeyPadding, kKeyPadding, kKeyPadding};
  if (has_keys) {
    int const channels = packed ? 1 : 2;
    int64_t const pitch = of.v.size(channels + 1);
    problem.v = {of.v.tensor.data_ptr(), packed ? pitch : of.v.stride(0), pitch,
                 of.v.size(channels) * pitch};
  }
  problem.out = view(results.out);
  problem.lse = static_cast<float*>(results.lse.data_ptr());
  problem.device = device;
  problem.out_float16 = options.out_float16;
  problem.exact_lse = options.exact_lse;
  problem.overlaps = options.overlaps;
  problem.score_offset = options.score_offset;
  auto blocks = [&](int64_t rows) {
    return packed ? attention::blocks_of_all(rows, sizes.batch, attention::kScaleRows)
                  : blocks_of(rows, attention::kScaleRows);
  };
  problem.q_scale =
      scale_view(of.q_scale, of.q, sizes.batch, sizes.heads_q, blocks(rows_q), packed);
  problem.k_scale =
      scale_view(of.k_scale, of.q, sizes.batch, sizes.heads_kv, blocks(rows_k), packed);
  problem.v_scale = scale_view(of.v_scale, of.q, sizes.batch, sizes.heads_kv, sizes.head_dim_v);
  std::optional<Tensor> workspace;
  if (int64_t const bytes = kernel.workspace_bytes(problem)) {
    workspace = empty({bytes}, ScalarType::Byte, of.q.device);
    problem.workspace = workspace->data_ptr();
  }
  require_success(kernel.launch(problem, current_stream(of.q.device)), kernel.config.name);
}

void check_tiles(AttentionCall const& call) {
  int64_t const tiles = attention::most_tiles(call, attention::kScaleRows);
  require(static_cast<double>(tiles) * call.sizes.heads_q < kFp8Limit,
          "q has 2^30 blocks of rows or more");
}

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
Results attend(AttentionCall call, Operands const& of, bool out_float16, bool with_lse,
               std::optional<Tensor> const& sinks_tensor, std::optional<Tensor> const& score_offset,
               int64_t sm_margin, TileName const& tile) {
  check_values(of.v, call);
  check_tiles(call);
  hopper(of.q.device);
  torch::stable::accelerator::DeviceGuard const guard(of.q.device);
  Sinks const sinks(sinks_tensor, of.q, call.sizes.heads_q);
  call.sinks = sinks.data();
  Results const results = empty_results(call, out_float16, of.q.device);
  float const* const offset = check_score_offset(score_offset, of.q, results.lse);
  if (results.lse.numel() == 0) return results;
  Fp8ForwardKernel const& kernel = kernel_of(score_type(of.q.dtype), call, tile, with_lse);
  require(offset == nullptr || kernel.config.any_call, "score_offset needs sinks or a window");
  launch(kernel, call, of, {out_float16, with_lse, false, offset, sm_margin}, results);
  return results;
}

std::tuple<Tensor, Tensor> flash_attn_fp8_forward(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& q_scale, Tensor const& k_scale,
    Tensor const& v_scale, double softmax_scale, bool causal, bool out_float16,
    std::optional<StringHandle> tile_config, std::optional<Tensor> sinks,
    std::optional<Tensor> score_offset, bool with_lse, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, int64_t sm_margin) {
  TileName const tile(tile_config);
  Operands const of{{"q", q},
                    {"k", k},
                    {"v", v},
                    {"q_scale", q_scale},
                    {"k_scale", k_scale},
                    {"v_scale", v_scale}};
  check_elements(of, 4);
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
  Operands const of{{"q", q},
                    {"k", k},
                    {"v", v},
                    {"q_scale", q_scale},
                    {"k_scale", k_scale},
                    {"v_scale", v_scale}};
  check_elements(of, 3);
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
  check_tiles(call);
  hopper(q.device);
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Sinks const sinks(sinks_tensor, q, call.sizes.heads_q);
  call.sinks = sinks.data();
  Fp8Rows const q_rows =
      prepare_rows(q, query_rows(call), false, how.incoherent, how.seed, how.to_int8);
  Fp8Rows const k_rows =
      prepare_rows(k, key_rows(call), how.smooth_k, how.incoherent, how.seed, how.to_int8);
  Fp8Values const values = prepare_values(v, key_rows(call));
  Results const results = empty_results(call, out_float16, q.device);
  if (results.lse.numel() == 0) return {results.out, results.lse, k_rows.shift};
  ScoreType const type = how.to_int8 ? ScoreType::kInt8 : ScoreType::kE4m3;
  Fp8ForwardKernel const& kernel = kernel_of(type, call, tile, with_lse);

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
        call.scale, static_cast<float*>(offset->data_ptr())};
  }
  float* const data = offset ? static_cast<float*>(offset->data_ptr()) : nullptr;
  cudaStream_t const stream = current_stream(q.device);
  require_success(fp8::launch_quantize(problem, stream), "quantisation");
  Operands const of{{"q", q_rows.data},        {"k", k_rows.data},
                    {"v", values.data},        {"q_scale", q_rows.scale},
                    {"k_scale", k_rows.scale}, {"v_scale", values.scale}};
  bool const takes_offset = kernel.config.any_call;
  launch(kernel, call, of,
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
