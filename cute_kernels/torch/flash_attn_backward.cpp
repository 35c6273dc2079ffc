#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/backward/slots.hpp"
#include "cute_kernels/attention/combine/merge.hpp"
#include "cute_kernels/attention/problem.hpp"
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
using attention::BackwardKernel;
using attention::BackwardProblem;
using attention::CallSizes;
using attention::ElementType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// What a forward pass left, and the gradients of its results.
struct Results {
  Argument grad_out;
  std::optional<Argument> grad_lse;
  Argument out;
  Argument lse;

  Results(Tensor const& grad_out, std::optional<Tensor> const& grad_lse, Tensor const& out,
          Tensor const& lse)
      : grad_out("grad_out", grad_out), out("out", out), lse("lse", lse) {
    if (grad_lse) this->grad_lse.emplace("grad_lse", *grad_lse);
  }

  /// Throws unless they are those of a call of q and v.
  void check(Argument const& q, Argument const& v, std::initializer_list<int64_t> lse_shape) const {
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

 private:
  static void check_lse(Argument const& a, Argument const& q,
                        std::initializer_list<int64_t> shape) {
    check_device(a, q);
    require(a.dtype == ScalarType::Float, a.name, " is not float32");
    require(a.sizes.equals({shape.begin(), shape.size()}), a.name,
            " does not have a value for each query of each head");
  }
};

BackwardKernel const& backward_kernel_for(ElementType dtype, AttentionCall const& call,
                                          TileName const& tile) {
  auto const choose = [&] { return automatic_choice(attention::backward_kernels, dtype, call); };
  return kernel_for(attention::backward_kernels, choose, dtype, call, tile);
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

/// Of q, k, v and the sinks.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

/// Tensors of float32 that the gradients of q, k and v are written to, or added to.
struct Given {
  Tensor const& grad_q;
  Tensor const& grad_k;
  Tensor const& grad_v;
  bool add_to_q;
  bool add_to_kv;

  /// Throws unless they have the shapes of q, k and v.
  void check(Argument const& q, Argument const& k, Argument const& v) const {
    check_one({"grad_q", grad_q}, q);
    check_one({"grad_k", grad_k}, k);
    check_one({"grad_v", grad_v}, v);
  }

 private:
  static void check_one(Argument const& grad, Argument const& like) {
    check_device(grad, like);
    require(grad.dtype == ScalarType::Float, grad.name, " is not float32");
    require(grad.sizes.equals(like.sizes), grad.name, " does not have ", like.name, "'s shape");
    require(grad.tensor.numel() == 0 || suits_tma(grad, sizeof(float)), grad.name,
            "'s address or strides are not multiples of 16 bytes");
  }
};

/// Of a call that is checked, as its results are. Without `given` new tensors of the inputs' dtype.
Gradients answer(AttentionCall const& call, BackwardKernel const& kernel, bool deterministic,
                 attention::Device const& device, Argument const& q, Argument const& k,
                 Argument const& v, std::optional<Tensor> const& sinks_tensor,
                 Results const& results, Given const* given,
                 attention::VariantArguments const* variant = nullptr) {
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

Gradients dense_backward(Given const* given, Tensor const& grad_out,
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
  Results const results(grad_out, grad_lse, out, lse);
  results.check(q, v, {q.size(0), q.size(2), q.size(1)});
  BackwardKernel const& kernel = backward_kernel_for(element_type(q.dtype), call, tile);
  return answer(call, kernel, deterministic, hopper(q.device, sm_margin), q, k, v, sinks, results,
                given);
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
  Given const given{grad_q, grad_k, grad_v, add_to_q, add_to_kv};
  return std::get<3>(dense_backward(
      &given, grad_out, grad_lse, q, k, v, out, lse, softmax_scale, deterministic, tile_config,
      sinks, mask_of(causal, window_left, window_right, diagonal), softcap, sm_margin));
}

/// The same of packed sequences. What cu_seqlens and seqused hold is not looked at here.
Gradients packed_backward(Given const* given, Tensor const& grad_out,
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
  Results const results(grad_out, grad_lse, out, lse);
  results.check(q, v, {q.size(1), q.size(0)});
  BackwardKernel const& kernel = backward_kernel_for(element_type(q.dtype), call, tile);
  return answer(call, kernel, deterministic, hopper(q.device, sm_margin), q, k, v, sinks, results,
                given);
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
  Given const given{grad_q, grad_k, grad_v, add_to_q, add_to_kv};
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
  Results const results(grad_out, grad_lse, out, lse);
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
      answer(call, kernel, deterministic, hopper(q.device, sm_margin), q, k, v, sinks, results,
             nullptr, &variant);
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
