#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/backward/slots.hpp"
#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/backward_call.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/measured_choice.hpp"
#include "cute_kernels/torch/packed_call.hpp"
#include "cute_kernels/torch/require.hpp"
#include "cute_kernels/torch/tensor.hpp"
#include "cute_kernels/torch/variant_call.hpp"

namespace cute_kernels::binding {
namespace {

using attention::AttentionCall;
using attention::BackwardKernel;
using attention::CallSizes;
using attention::ElementType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

BackwardKernel const& backward_kernel_for(ElementType dtype, AttentionCall const& call,
                                          TileName const& tile) {
  auto const choose = [&] { return automatic_choice(attention::backward_kernels, dtype, call); };
  return kernel_for(attention::backward_kernels, choose, dtype, call, tile);
}

Gradients dense_backward(GivenGradients const* given, Tensor const& grad_out,
                         std::optional<Tensor> const& grad_lse, Tensor const& q_tensor,
                         Tensor const& k_tensor, Tensor const& v_tensor, Tensor const& out,
                         Tensor const& lse, double softmax_scale, bool deterministic,
                         std::optional<StringHandle> tile_config,
                         std::optional<Tensor> const& sinks, attention::MaskSpec const& mask,
                         double softcap, int64_t sm_margin) {
  TileName const tile(tile_config);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  AttentionCall call = check_call(q, k, v, softmax_scale, mask);
  call.softcap = checked_softcap(softcap);
  ForwardResults const results(grad_out, grad_lse, out, lse);
  results.check(q, v, {q.size(0), q.size(2), q.size(1)});
  BackwardKernel const& kernel = backward_kernel_for(element_type(q.dtype), call, tile);
  return answer_backward(call, kernel, deterministic, hopper(q.device, sm_margin), q, k, v, sinks,
                         results, given);
}

Gradients flash_attn_backward(Tensor const& grad_out, std::optional<Tensor> grad_lse,
                              Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& out,
                              Tensor const& lse, double softmax_scale, bool causal,
                              bool deterministic, std::optional<StringHandle> tile_config,
                              std::optional<Tensor> sinks, std::optional<int64_t> window_left,
                              std::optional<int64_t> window_right, std::optional<int64_t> diagonal,
                              double softcap, int64_t sm_margin) {
  return dense_backward(nullptr, grad_out, grad_lse, q, k, v, out, lse, softmax_scale,
                        deterministic, tile_config, sinks,
                        mask_of(causal, window_left, window_right, diagonal), softcap, sm_margin);
}

Tensor flash_attn_backward_into(
    Tensor const& grad_q, Tensor const& grad_k, Tensor const& grad_v, bool add_to_q, bool add_to_kv,
    Tensor const& grad_out, std::optional<Tensor> grad_lse, Tensor const& q, Tensor const& k,
    Tensor const& v, Tensor const& out, Tensor const& lse, double softmax_scale, bool causal,
    bool deterministic, std::optional<StringHandle> tile_config, std::optional<Tensor> sinks,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    std::optional<int64_t> diagonal, double softcap, int64_t sm_margin) {
  GivenGradients const given{grad_q, grad_k, grad_v, add_to_q, add_to_kv};
  return std::get<3>(dense_backward(
      &given, grad_out, grad_lse, q, k, v, out, lse, softmax_scale, deterministic, tile_config,
      sinks, mask_of(causal, window_left, window_right, diagonal), softcap, sm_margin));
}

/// The same of packed sequences. What cu_seqlens and seqused hold is not looked at here.
Gradients packed_backward(GivenGradients const* given, Tensor const& grad_out,
                          std::optional<Tensor> const& grad_lse, Tensor const& q_tensor,
                          Tensor const& k_tensor, Tensor const& v_tensor, Tensor const& out,
                          Tensor const& lse, PackedCall const& packed, double softmax_scale,
                          attention::MaskSpec const& mask, std::optional<Tensor> const& sinks,
                          bool deterministic, std::optional<StringHandle> tile_config,
                          double softcap, int64_t sm_margin) {
  TileName const tile(tile_config);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  AttentionCall call = check_packed_call(q, k, v, softmax_scale, mask, packed);
  call.softcap = checked_softcap(softcap);
  ForwardResults const results(grad_out, grad_lse, out, lse);
  results.check(q, v, {q.size(1), q.size(0)});
  BackwardKernel const& kernel = backward_kernel_for(element_type(q.dtype), call, tile);
  return answer_backward(call, kernel, deterministic, hopper(q.device, sm_margin), q, k, v, sinks,
                         results, given);
}

Gradients flash_attn_varlen_backward(
    Tensor const& grad_out, std::optional<Tensor> grad_lse, Tensor const& q, Tensor const& k,
    Tensor const& v, Tensor const& out, Tensor const& lse, Tensor const& cu_seqlens_q,
    Tensor const& cu_seqlens_k, std::optional<Tensor> seqused_q, std::optional<Tensor> seqused_k,
    std::optional<Tensor> diagonal, double softmax_scale, bool causal, std::optional<Tensor> sinks,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, bool deterministic,
    std::optional<StringHandle> tile_config, double softcap, int64_t sm_margin) {
  return packed_backward(
      nullptr, grad_out, grad_lse, q, k, v, out, lse,
      {cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal, max_seqlen_q, max_seqlen_k},
      softmax_scale, mask_of(causal, window_left, window_right, std::nullopt), sinks, deterministic,
      tile_config, softcap, sm_margin);
}

Tensor flash_attn_varlen_backward_into(
    Tensor const& grad_q, Tensor const& grad_k, Tensor const& grad_v, bool add_to_q, bool add_to_kv,
    Tensor const& grad_out, std::optional<Tensor> grad_lse, Tensor const& q, Tensor const& k,
    Tensor const& v, Tensor const& out, Tensor const& lse, Tensor const& cu_seqlens_q,
    Tensor const& cu_seqlens_k, std::optional<Tensor> seqused_q, std::optional<Tensor> seqused_k,
    std::optional<Tensor> diagonal, double softmax_scale, bool causal, std::optional<Tensor> sinks,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, bool deterministic,
    std::optional<StringHandle> tile_config, double softcap, int64_t sm_margin) {
  GivenGradients const given{grad_q, grad_k, grad_v, add_to_q, add_to_kv};
  return std::get<3>(packed_backward(
      &given, grad_out, grad_lse, q, k, v, out, lse,
      {cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal, max_seqlen_q, max_seqlen_k},
      softmax_scale, mask_of(causal, window_left, window_right, std::nullopt), sinks, deterministic,
      tile_config, softcap, sm_margin));
}

/// Where the kernel writes what it computes of a captured tensor's gradient.
Tensor empty_captured_gradient(AttentionCall const& call, BackwardKernel const& kernel,
                               attention::Gradient kind, int device) {
  CallSizes const& sizes = call.sizes;
  if (kind == attention::Gradient::kOfScores) {
    require(!call.is_packed(), "packed sequences have no gradient by query or key");
    return empty({sizes.batch, sizes.heads_q, sizes.seqlen_q, sizes.seqlen_k}, ScalarType::Float,
                 device);
  }
  constexpr int kWarps = 8;
  return empty({attention::tensor_batch(call), sizes.heads_q,
                attention::key_block_numbers(call, kernel.config.tile_n), kWarps},
               ScalarType::Float, device);
}

/// Either of them with a variant, by the kernel of this name, which computes the gradients of as
/// many captured tensors as there are kinds.
std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> flash_attn_variant_backward(
    Tensor const& grad_out, std::optional<Tensor> grad_lse, Tensor const& q_tensor,
    Tensor const& k_tensor, Tensor const& v_tensor, Tensor const& out, Tensor const& lse,
    std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
    std::optional<Tensor> seqused_q, std::optional<Tensor> seqused_k, std::vector<Tensor> captured,
    std::vector<Tensor> block_lists, std::vector<double> numbers,
    std::optional<StringHandle> variant_key, std::optional<StringHandle> tile_config,
    std::vector<int64_t> gradient_kinds, double softmax_scale, bool causal,
    std::optional<Tensor> sinks, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, bool deterministic, int64_t sm_margin) {
  TileName const key(variant_key), tile(tile_config);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  attention::VariantArguments variant{};
  std::optional<Tensor> const diagonal;
  AttentionCall const call =
      check_variant_call(q, k, v,
                         packed_call_of(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal,
                                        max_seqlen_q, max_seqlen_k),
                         captured, numbers, softmax_scale,
                         mask_of(causal, window_left, window_right, std::nullopt), variant);
  variant.blocks = block_lists_of(block_lists, Rows::kKeys, call, q);
  ForwardResults const results(grad_out, grad_lse, out, lse);
  if (call.is_packed()) {
    results.check(q, v, {q.size(1), q.size(0)});
  } else {
    results.check(q, v, {q.size(0), q.size(2), q.size(1)});
  }
  BackwardKernel const& kernel =
      variant_kernel(attention::backward_kernels, element_type(q.dtype), call, key, tile);
  require(gradient_kinds.size() <= attention::kMostCaptured, "too many gradients");
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  std::vector<Tensor> of_captured;
  for (int64_t kind : gradient_kinds) {
    Tensor gradient = empty_captured_gradient(call, kernel, attention::Gradient(kind), q.device);
    torch::stable::zero_(gradient);
    variant.gradients[of_captured.size()] = static_cast<float*>(gradient.data_ptr());
    of_captured.push_back(gradient);
  }
  auto const [grad_q, grad_k, grad_v, grad_sinks] =
      answer_backward(call, kernel, deterministic, hopper(q.device, sm_margin), q, k, v, sinks,
                      results, nullptr, &variant);
  return {grad_q, grad_k, grad_v, grad_sinks, of_captured};
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "flash_attn_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, float softmax_scale, bool causal, bool deterministic, "
      "str? tile_config=None, Tensor? sinks=None, *, SymInt? window_left=None, "
      "SymInt? window_right=None, SymInt? diagonal=None, float softcap=0.0, "
      "SymInt sm_margin=0) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks)");
  // The same into given tensors of float32, or added to them.
  library.def(
      "flash_attn_backward_into(Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, "
      "bool add_to_q, bool add_to_kv, Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
      "Tensor v, Tensor out, Tensor lse, float softmax_scale, bool causal, bool deterministic, "
      "str? tile_config=None, Tensor? sinks=None, *, SymInt? window_left=None, "
      "SymInt? window_right=None, SymInt? diagonal=None, float softcap=0.0, "
      "SymInt sm_margin=0) -> Tensor grad_sinks");
  library.def(
      "flash_attn_variant_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
      "Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? seqused_q, Tensor? seqused_k, Tensor[] captured, Tensor[] block_lists, "
      "float[] numbers, str? variant, str? tile_config, int[] gradient_kinds, float softmax_scale, "
      "bool causal, Tensor? sinks, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
      "SymInt? window_left, SymInt? window_right, bool deterministic, SymInt sm_margin) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks, Tensor[] grad_captured)");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  // A build without backward rows answers from Python, with an error that says so.
  if (!cute_kernels::attention::backward_kernels.is_built()) return;
  library.impl("flash_attn_backward", TORCH_BOX(&cute_kernels::binding::flash_attn_backward));
  library.impl("flash_attn_backward_into",
               TORCH_BOX(&cute_kernels::binding::flash_attn_backward_into));
  library.impl("flash_attn_varlen_backward",
               TORCH_BOX(&cute_kernels::binding::flash_attn_varlen_backward));
  library.impl("flash_attn_varlen_backward_into",
               TORCH_BOX(&cute_kernels::binding::flash_attn_varlen_backward_into));
  library.impl("flash_attn_variant_backward",
               TORCH_BOX(&cute_kernels::binding::flash_attn_variant_backward));
}
