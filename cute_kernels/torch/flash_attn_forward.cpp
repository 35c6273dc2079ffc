#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/schedule/work_list.hpp"
#include "cute_kernels/attention/tile_config.hpp"
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
using attention::CallSizes;
using attention::ElementType;
using attention::ForwardKernel;
using attention::ForwardProblem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ForwardKernel const& forward_kernel_for(ElementType dtype, AttentionCall const& call,
                                        TileName const& tile, int multiprocessors) {
  auto const choose = [&] { return automatic_choice(dtype, call, multiprocessors); };
  return kernel_for(attention::forward_kernels, choose, dtype, call, tile);
}

void require_few_tiles(AttentionCall const& call, ForwardKernel const& kernel) {
  double const most = attention::most_tiles(call, kernel.config.tile_m);
  require(most * call.sizes.heads_q < double{1 << 30}, "q has 2^30 blocks or more");
}

/// Output and LSE, not initialised.
std::tuple<Tensor, Tensor> empty_results(AttentionCall const& call, Argument const& q) {
  CallSizes const& sizes = call.sizes;
  if (call.is_packed()) {
    return {empty({q.size(0), sizes.heads_q, sizes.head_dim_v}, q.dtype, q.device),
            empty({sizes.heads_q, q.size(0)}, ScalarType::Float, q.device)};
  }
  return {empty({sizes.batch, sizes.seqlen_q, sizes.heads_q, sizes.head_dim_v}, q.dtype, q.device),
          empty({sizes.batch, sizes.heads_q, sizes.seqlen_q}, ScalarType::Float, q.device)};
}

/// Output and LSE of a call that was checked, of shapes that fit it. Where they have no elements
/// nothing is launched.
void answer(AttentionCall const& call, ForwardKernel const& kernel, attention::Device const& device,
            Argument const& q, Argument const& k, Argument const& v, Tensor const& out,
            Tensor const& lse, attention::VariantArguments const* variant = nullptr) {
  if (lse.numel() == 0) return;
  // The copies, if any, and the workspace live until the launch is enqueued: the allocator reuses
  // memory in stream order.
  bool const has_keys = attention::tensor_rows_k(call) > 0;
  Tensor const q_readable = tma_readable(q, kElementBytes);
  Tensor const k_readable = has_keys
                                ? tma_readable(k, kElementBytes)
                                : out;  // without keys nothing is read, but an address is needed
  Tensor const v_readable = has_keys ? tma_readable(v, kElementBytes) : out;
  ForwardProblem problem{};
  problem.call = call;
  problem.q = view(q_readable);
  problem.k = view(k_readable);
  problem.v = view(v_readable);
  problem.out = view(out);
  problem.lse = static_cast<float*>(lse.data_ptr());
  problem.device = device;
  problem.variant = variant;
  std::optional<Tensor> workspace;
  if (int64_t const bytes = kernel.workspace_bytes(problem)) {
    workspace = empty({bytes}, ScalarType::Byte, q.device);
    problem.workspace = workspace->data_ptr();
  }
  require_success(kernel.launch(problem, current_stream(q.device)), kernel.config.name);
}

/// `deterministic` is for the gradient; the forward pass always is.
std::tuple<Tensor, Tensor> flash_attn_forward(
    Tensor const& q_tensor, Tensor const& k_tensor, Tensor const& v_tensor, double softmax_scale,
    bool causal, std::optional<StringHandle> tile_config, [[maybe_unused]] bool deterministic,
    std::optional<Tensor> sinks_tensor, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, std::optional<int64_t> diagonal, double softcap,
    int64_t sm_margin) {
  TileName const tile(tile_config);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  AttentionCall call =
      check_call(q, k, v, softmax_scale, mask_of(causal, window_left, window_right, diagonal));
  CallSizes const& sizes = call.sizes;
  attention::Device const device = hopper(q.device, sm_margin);
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Sinks const sinks(sinks_tensor, q, sizes.heads_q);
  call.sinks = sinks.data();
  call.softcap = checked_softcap(softcap);
  ForwardKernel const& kernel =
      forward_kernel_for(element_type(q.dtype), call, tile, device.multiprocessors);
  require_few_tiles(call, kernel);
  auto const [out, lse] = empty_results(call, q);
  answer(call, kernel, device, q, k, v, out, lse);
  return {out, lse};
}

/// (batch, heads, seqlen, head_dim) as (batch, seqlen, heads, head_dim), or the other way round:
/// the same memory. PyTorch's own transpose costs a small call's host a tenth, for each tensor.
Tensor with_heads_and_rows_exchanged(Tensor const& tensor) {
  auto const sizes = tensor.sizes();
  auto const strides = tensor.strides();
  require(sizes.size() == 4, "a tensor does not have 4 dimensions");
  int64_t const new_sizes[] = {sizes[0], sizes[2], sizes[1], sizes[3]};
  int64_t const new_strides[] = {strides[0], strides[2], strides[1], strides[3]};
  AtenTensorHandle handle = nullptr;
  require_torch(aoti_torch__reinterpret_tensor(tensor.get(), 4, new_sizes, new_strides, 0, &handle),
                "make a view of a tensor");
  return Tensor(handle);
}

/// Of tensors as PyTorch's scaled_dot_product_attention has them, as is the output.
std::tuple<Tensor, Tensor> flash_attn_heads_first(Tensor const& q, Tensor const& k, Tensor const& v,
                                                  double softmax_scale, bool causal) {
  auto const [out, lse] =
      flash_attn_forward(with_heads_and_rows_exchanged(q), with_heads_and_rows_exchanged(k),
                         with_heads_and_rows_exchanged(v), softmax_scale, causal, std::nullopt,
                         false, std::nullopt, std::nullopt, std::nullopt, std::nullopt, 0.0, 0);
  return {with_heads_and_rows_exchanged(out), lse};
}

/// The same of packed sequences. What cu_seqlens and seqused hold is not looked at here.
std::tuple<Tensor, Tensor> flash_attn_varlen_forward(
    Tensor const& q_tensor, Tensor const& k_tensor, Tensor const& v_tensor,
    Tensor const& cu_seqlens_q, Tensor const& cu_seqlens_k, std::optional<Tensor> seqused_q,
    std::optional<Tensor> seqused_k, std::optional<Tensor> diagonal, double softmax_scale,
    bool causal, std::optional<Tensor> sinks_tensor, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, [[maybe_unused]] bool deterministic,
    std::optional<StringHandle> tile_config, double softcap, int64_t sm_margin) {
  TileName const tile(tile_config);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  PackedCall const packed{cu_seqlens_q, cu_seqlens_k, seqused_q,   seqused_k,
                          diagonal,     max_seqlen_q, max_seqlen_k};
  AttentionCall call = check_packed_call(
      q, k, v, softmax_scale, mask_of(causal, window_left, window_right, std::nullopt), packed);
  CallSizes const& sizes = call.sizes;
  attention::Device const device = hopper(q.device, sm_margin);
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Sinks const sinks(sinks_tensor, q, sizes.heads_q);
  call.sinks = sinks.data();
  call.softcap = checked_softcap(softcap);
  ForwardKernel const& kernel =
      forward_kernel_for(element_type(q.dtype), call, tile, device.multiprocessors);
  require_few_tiles(call, kernel);
  auto const [out, lse] = empty_results(call, q);
  answer(call, kernel, device, q, k, v, out, lse);
  return {out, lse};
}

/// Either of them with a variant, by the kernel of this name.
std::tuple<Tensor, Tensor> flash_attn_variant_forward(
    Tensor const& q_tensor, Tensor const& k_tensor, Tensor const& v_tensor,
    std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
    std::optional<Tensor> seqused_q, std::optional<Tensor> seqused_k, std::vector<Tensor> captured,
    std::vector<Tensor> block_lists, std::vector<double> numbers,
    std::optional<StringHandle> variant_key, std::optional<StringHandle> tile_config,
    [[maybe_unused]] std::optional<StringHandle> backward_tile_config,
    [[maybe_unused]] std::vector<int64_t> gradients_of, double softmax_scale, bool causal,
    std::optional<Tensor> sinks_tensor, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, [[maybe_unused]] bool deterministic, int64_t sm_margin) {
  TileName const key(variant_key), tile(tile_config), unused(backward_tile_config);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  attention::VariantArguments variant{};
  std::optional<Tensor> const diagonal;
  AttentionCall call =
      check_variant_call(q, k, v,
                         packed_call_of(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal,
                                        max_seqlen_q, max_seqlen_k),
                         captured, numbers, softmax_scale,
                         mask_of(causal, window_left, window_right, std::nullopt), variant);
  variant.blocks = block_lists_of(block_lists, Rows::kQueries, call, q);
  attention::Device const device = hopper(q.device, sm_margin);
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Sinks const sinks(sinks_tensor, q, call.sizes.heads_q);
  call.sinks = sinks.data();
  ForwardKernel const& kernel =
      variant_kernel(attention::forward_kernels, element_type(q.dtype), call, key, tile);
  require_few_tiles(call, kernel);
  auto const [out, lse] = empty_results(call, q);
  answer(call, kernel, device, q, k, v, out, lse, &variant);
  return {out, lse};
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY(cute_kernels, library) {
  library.def(
      "flash_attn_forward(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, "
      "str? tile_config=None, bool deterministic=False, Tensor? sinks=None, *, "
      "SymInt? window_left=None, SymInt? window_right=None, SymInt? diagonal=None, "
      "float softcap=0.0, SymInt sm_margin=0) -> (Tensor out, Tensor lse)");
  // (batch, heads, seqlen, head_dim), without a gradient of its own.
  library.def(
      "flash_attn_heads_first(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal) -> "
      "(Tensor out, Tensor lse)");
  library.def(
      "flash_attn_variant_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor[] captured, "
      "Tensor[] block_lists, float[] numbers, str? variant, str? tile_config, "
      "str? backward_tile_config, int[] gradients_of, float softmax_scale, bool causal, "
      "Tensor? sinks, SymInt? max_seqlen_q, SymInt? max_seqlen_k, SymInt? window_left, "
      "SymInt? window_right, bool deterministic, SymInt sm_margin) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("flash_attn_forward", TORCH_BOX(&cute_kernels::binding::flash_attn_forward));
  library.impl("flash_attn_heads_first", TORCH_BOX(&cute_kernels::binding::flash_attn_heads_first));
  library.impl("flash_attn_varlen_forward",
               TORCH_BOX(&cute_kernels::binding::flash_attn_varlen_forward));
  library.impl("flash_attn_variant_forward",
               TORCH_BOX(&cute_kernels::binding::flash_attn_variant_forward));
}
