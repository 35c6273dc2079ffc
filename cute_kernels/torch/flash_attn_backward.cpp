#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/require.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {
namespace {

using attention::AttentionCall;
using attention::BackwardKernel;
using attention::BackwardProblem;
using attention::CallSizes;
using attention::ElementType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// The output or its gradient.
void check_output(Argument const& a, Argument const& q) {
  check_like(a, q);
  require(a.sizes.equals(q.sizes), a.name, " does not have q's shape");
}

/// The LSE or its gradient.
void check_lse(Argument const& a, Argument const& q) {
  check_device(a, q);
  require(a.dtype == ScalarType::Float, a.name, " is not float32");
  int64_t const sizes[] = {q.size(0), q.size(2), q.size(1)};
  require(a.sizes.equals({sizes, 3}), a.name, " is not (batch, heads, seqlen_q)");
}

Tensor dense(Argument const& a) {
  return a.tensor.is_contiguous() ? a.tensor : torch::stable::contiguous(a.tensor);
}

/// The gradients of q, k and v.
std::tuple<Tensor, Tensor, Tensor> flash_attn_backward(
    Tensor const& grad_out_tensor, std::optional<Tensor> grad_lse_tensor, Tensor const& q_tensor,
    Tensor const& k_tensor, Tensor const& v_tensor, Tensor const& out_tensor,
    Tensor const& lse_tensor, double softmax_scale, bool causal, bool deterministic,
    std::optional<StringHandle> tile_config, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, std::optional<int64_t> diagonal) {
  TileName const tile(tile_config);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  Argument const out("out", out_tensor), grad_out("grad_out", grad_out_tensor);
  Argument const lse("lse", lse_tensor);
  AttentionCall const call =
      check_call(q, k, v, softmax_scale, mask_of(causal, window_left, window_right, diagonal));
  CallSizes const& sizes = call.sizes;
  check_output(out, q);
  check_output(grad_out, q);
  check_lse(lse, q);
  std::optional<Argument> grad_lse;
  if (grad_lse_tensor.has_value()) {
    grad_lse.emplace("grad_lse", *grad_lse_tensor);
    check_lse(*grad_lse, q);
  }
  attention::Device const& device = hopper(q.device);
  ElementType const dtype = element_type(q.dtype);
  auto const choose = [&] {
    return attention::choose_fitting(attention::backward_kernels, dtype, call);
  };
  BackwardKernel const& kernel = kernel_for(attention::backward_kernels, choose, dtype, call, tile);

  constexpr int kLeastQueries = 64;  // of a block
  require(static_cast<double>(sizes.batch) * sizes.heads_q *
                  ((q.size(1) + kLeastQueries - 1) / kLeastQueries) <
              double{1 << 30},
          "q has shape ", Shape{q.sizes}, ", batch * heads * blocks of ", kLeastQueries,
          " queries must be below 2^30");
  int64_t const key_blocks = (k.size(1) + kernel.config.tile_n - 1) / kernel.config.tile_n;
  require(static_cast<double>(sizes.batch) * sizes.heads_kv * key_blocks < double{1 << 30},
          "k has 2^30 blocks or more");

  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Tensor grad_q = empty(4, q.sizes.data(), q.dtype, q.device);
  Tensor grad_k = empty(4, k.sizes.data(), q.dtype, q.device);
  Tensor grad_v = empty(4, v.sizes.data(), q.dtype, q.device);
  if (sizes.batch == 0 || sizes.heads_q == 0 || sizes.seqlen_q == 0 || sizes.seqlen_k == 0) {
    for (Tensor* grad : {&grad_q, &grad_k, &grad_v}) torch::stable::zero_(*grad);
    return {grad_q, grad_k, grad_v};
  }

  // The copies, if any, and the workspace live until the launch is enqueued: the allocator reuses
  // memory in stream order.
  Tensor const q_readable = tma_readable(q, kElementBytes);
  Tensor const k_readable = tma_readable(k, kElementBytes);
  Tensor const v_readable = tma_readable(v, kElementBytes);
  Tensor const out_readable = tma_readable(out, kElementBytes);
  Tensor const grad_out_readable = tma_readable(grad_out, kElementBytes);
  Tensor const lse_dense = dense(lse);
  std::optional<Tensor> grad_lse_dense;
  if (grad_lse.has_value()) grad_lse_dense = dense(*grad_lse);
  BackwardProblem problem{};
  problem.call = call;
  problem.deterministic = deterministic;
  problem.q = view(q_readable);
  problem.k = view(k_readable);
  problem.v = view(v_readable);
  problem.out = view(out_readable);
  problem.grad_out = view(grad_out_readable);
  problem.lse = static_cast<float const*>(lse_dense.data_ptr());
  if (grad_lse_dense) problem.grad_lse = static_cast<float const*>(grad_lse_dense->data_ptr());
  problem.grad_q = view(grad_q);
  problem.grad_k = view(grad_k);
  problem.grad_v = view(grad_v);
  problem.device = device;
  Tensor const workspace = empty({kernel.workspace_bytes(problem)}, ScalarType::Byte, q.device);
  problem.workspace = workspace.data_ptr();
  require_success(kernel.launch(problem, current_stream(q.device)), kernel.config.name);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "flash_attn_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, float softmax_scale, bool causal, bool deterministic, "
      "str? tile_config=None, *, SymInt? window_left=None, SymInt? window_right=None, "
      "SymInt? diagonal=None) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  // A build without backward rows answers from Python, with an error that says so.
  if (!cute_kernels::attention::backward_kernels.is_built()) return;
  library.impl("flash_attn_backward", TORCH_BOX(&cute_kernels::binding::flash_attn_backward));
}
