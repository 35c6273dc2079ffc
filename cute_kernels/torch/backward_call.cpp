#include "cute_kernels/torch/backward_call.hpp"

#include <algorithm>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "cute_kernels/attention/backward/slots.hpp"
#include "cute_kernels/attention/combine/merge.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {

using attention::AttentionCall;
using attention::BackwardKernel;
using attention::BackwardProblem;
using attention::CallSizes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void check_lse(Argument const& a, Argument const& q, std::initializer_list<int64_t> shape) {
  check_device(a, q);
  require(a.dtype == ScalarType::Float, a.name, " is not float32");
  require(a.sizes.equals({shape.begin(), shape.size()}), a.name,
          " does not have a value for each query of each head");
}

void check_given(Argument const& grad, Argument const& like) {
  check_device(grad, like);
  require(grad.dtype == ScalarType::Float, grad.name, " is not float32");
  require(grad.sizes.equals(like.sizes), grad.name, " does not have ", like.name, "'s shape");
  require(grad.tensor.numel() == 0 || suits_tma(grad, sizeof(float)), grad.name,
          "'s address or strides are not multiples of 16 bytes");
}

void require_few_blocks(AttentionCall const& call, BackwardKernel const& kernel) {
  constexpr int kLeastQueries = 64;  // of a block
  double const entries = attention::tensor_batch(call);
  require(entries * call.sizes.heads_q * attention::query_block_numbers(call, kLeastQueries) <
              double{1 << 30},
          "q has 2^30 blocks of ", kLeastQueries, " queries or more");
  require(entries * call.sizes.heads_kv * attention::key_block_numbers(call, kernel.config.tile_n) <
              double{1 << 30},
          "k has 2^30 blocks or more");
  require(!call.is_packed() || std::max(attention::tensor_rows_q(call),
                                        attention::tensor_rows_k(call)) < attention::kManyRows,
          "q or k has 2^30 rows or more");
}

Tensor dense(Argument const& a) {
  return a.tensor.is_contiguous() ? a.tensor : torch::stable::contiguous(a.tensor);
}

Tensor empty_like(Argument const& a, ScalarType dtype) {
  return empty(static_cast<int>(a.sizes.size()), a.sizes.data(), dtype, a.device);
}

/// Of float32 and of the same sizes, of which there are some.
void add_in_place(Argument const& sum, Tensor const& term) {
  bool const is_dense = sum.sizes.size() == 4;
  size_t const rows = is_dense ? 1 : 0;
  attention::AddProblem const problem{view(sum.tensor),
                                      view(term),
                                      static_cast<int>(is_dense ? sum.size(0) : 1),
                                      static_cast<int>(sum.sizes[rows]),
                                      static_cast<int>(sum.sizes[rows + 1]),
                                      static_cast<int>(sum.sizes[rows + 2])};
  require_success(attention::launch_add(problem, current_stream(sum.device), sum.device), sum.name);
}

}  // namespace

ForwardResults::ForwardResults(Tensor const& grad_out, std::optional<Tensor> const& grad_lse,
                               Tensor const& out, Tensor const& lse)
    : grad_out("grad_out", grad_out), out("out", out), lse("lse", lse) {
  if (grad_lse) this->grad_lse.emplace("grad_lse", *grad_lse);
}

void ForwardResults::check(Argument const& q, Argument const& v,
                           std::initializer_list<int64_t> lse_shape) const {
  size_t const last = q.sizes.size() - 1;
  for (Argument const* a : {&out, &grad_out}) {
    check_like(*a, q);
    require(a->sizes.size() == q.sizes.size() &&
                a->sizes.slice(0, last).equals(q.sizes.slice(0, last)) &&
                a->sizes[last] == v.sizes[last],
            a->name, " does not have q's shape with v's head_dim");
  }
  check_lse(lse, q, lse_shape);
  if (grad_lse) check_lse(*grad_lse, q, lse_shape);
}

void GivenGradients::check(Argument const& q, Argument const& k, Argument const& v) const {
  check_given({"grad_q", grad_q}, q);
  check_given({"grad_k", grad_k}, k);
  check_given({"grad_v", grad_v}, v);
}

Gradients answer_backward(AttentionCall const& call, BackwardKernel const& kernel,
                          bool deterministic, attention::Device const& device, Argument const& q,
                          Argument const& k, Argument const& v,
                          std::optional<Tensor> const& sinks_tensor, ForwardResults const& results,
                          GivenGradients const* given, attention::VariantArguments const* variant) {
  require_few_blocks(call, kernel);
  if (given != nullptr) given->check(q, k, v);
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  bool const add_to_q = given != nullptr && given->add_to_q;
  bool const add_to_kv = given != nullptr && given->add_to_kv;
  ScalarType const dtype = given != nullptr ? ScalarType::Float : q.dtype;
  // Of keys and values the kernel may write gradients twice (hidden.hpp): nothing may be added to
  // before it has ended.
  Tensor grad_q = given != nullptr ? given->grad_q : empty_like(q, dtype);
  Tensor grad_k = given != nullptr && !add_to_kv ? given->grad_k : empty_like(k, dtype);
  Tensor grad_v = given != nullptr && !add_to_kv ? given->grad_v : empty_like(v, dtype);
  CallSizes const& sizes = call.sizes;
  Sinks const sinks(sinks_tensor, q, sizes.heads_q);
  bool const has_sinks = sinks.data() != nullptr;
  Tensor grad_sinks = empty({attention::tensor_batch(call), has_sinks ? sizes.heads_q : 0},
                            ScalarType::Float, q.device);
  // Without keys rows still see their sinks.
  if (sizes.batch == 0 || sizes.heads_q == 0 || attention::tensor_rows_q(call) == 0 ||
      (attention::tensor_rows_k(call) == 0 && !has_sinks)) {
    if (!add_to_q) torch::stable::zero_(grad_q);
    for (Tensor* grad : {&grad_k, &grad_v, &grad_sinks}) torch::stable::zero_(*grad);
    return {grad_q, grad_k, grad_v, grad_sinks};
  }

  // The copies, if any, and the workspace live until the launch is enqueued: the allocator reuses
  // memory in stream order.
  Tensor const q_readable = tma_readable(q, kElementBytes);
  Tensor const k_readable = tma_readable(k, kElementBytes);
  Tensor const v_readable = tma_readable(v, kElementBytes);
  Tensor const out_readable = tma_readable(results.out, kElementBytes);
  Tensor const grad_out_readable = tma_readable(results.grad_out, kElementBytes);
  Tensor const lse_dense = dense(results.lse);
  std::optional<Tensor> grad_lse_dense;
  if (results.grad_lse) grad_lse_dense = dense(*results.grad_lse);
  BackwardProblem problem{};
  problem.call = call;
  problem.deterministic = deterministic;
  problem.float_grads = given != nullptr;
  problem.adds_to_grad_q = add_to_q;
  problem.q = view(q_readable);
  problem.k = view(k_readable);
  problem.v = view(v_readable);
  problem.out = view(out_readable);
  problem.grad_out = view(grad_out_readable);
  problem.lse = static_cast<float const*>(lse_dense.data_ptr());
  if (grad_lse_dense) problem.grad_lse = static_cast<float const*>(grad_lse_dense->data_ptr());
  problem.sinks = sinks.data();
  problem.grad_q = view(grad_q);
  problem.grad_k = view(grad_k);
  problem.grad_v = view(grad_v);
  if (has_sinks) problem.grad_sinks = static_cast<float*>(grad_sinks.data_ptr());
  problem.device = device;
  problem.variant = variant;
  Tensor const workspace = empty({kernel.workspace_bytes(problem)}, ScalarType::Byte, q.device);
  problem.workspace = workspace.data_ptr();
  require_success(kernel.launch(problem, current_stream(q.device)), kernel.config.name);
  if (add_to_kv && attention::tensor_rows_k(call) > 0) {
    add_in_place({"grad_k", given->grad_k}, grad_k);
    add_in_place({"grad_v", given->grad_v}, grad_v);
  }
  return {grad_q, grad_k, grad_v, grad_sinks};
}

}  // namespace cute_kernels::binding
