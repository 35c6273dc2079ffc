#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/operators.hpp"
#include "cute_kernels/torch/require.hpp"

// A node in C++ for eager autograd. The stable ABI has none, and one in Python costs a small call
// 60 microseconds (docs/tuning.md). But ATen has an operator for fused attention that others
// implement, whose derivative is its own C++ node around another such operator. On CUDA nobody
// implements these two, and nothing of PyTorch calls them there; here they are flash_attn_forward
// and flash_attn_backward, with this library's layout, (batch, seqlen, heads, head_dim), and mask.
// Only python/cute_kernels/autograd.py calls them, which knows the schemas that this is written
// for.

namespace cute_kernels::binding {
namespace {

using torch::stable::Tensor;

/// Returned as max_q, so that the caller can tell whose implementation it has met.
constexpr int64_t kMadeHere = 0x63757465;  // "cute"

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t, Tensor, Tensor, Tensor>
fused_attention(Tensor const& q, Tensor const& k, Tensor const& v, std::optional<Tensor> attn_bias,
                double dropout_p, bool is_causal, bool return_debug_mask,
                std::optional<double> scale) {
  require(!attn_bias.has_value() && dropout_p == 0 && !return_debug_mask && scale.has_value(),
          "cute_kernels implements this operator for cute_kernels.flash_attn_func alone");
  auto const [out, lse] = flash_attn_forward(q, k, v, *scale, is_causal, kAutomatic, false);
  return {out, lse, Tensor(), Tensor(), kMadeHere, 0, Tensor(), Tensor(), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_attention_backward(
    Tensor const& grad_out, Tensor const& q, Tensor const& k, Tensor const& v, Tensor const&,
    std::vector<bool> const&, Tensor const& out, Tensor const& lse, Tensor const&, Tensor const&,
    int64_t, int64_t, double, bool is_causal, Tensor const&, Tensor const&,
    std::optional<double> scale) {
  require(scale.has_value(),
          "cute_kernels implements this operator for cute_kernels.flash_attn_func alone");
  auto const [grad_q, grad_k, grad_v] = flash_attn_backward(
      grad_out, std::nullopt, q, k, v, out, lse, *scale, is_causal, false, kAutomatic);
  return {grad_q, grad_k, grad_v, Tensor()};
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  if (cute_kernels::attention::kBackwardRegistry.count == 0) return;
  library.impl("_scaled_dot_product_fused_attention_overrideable",
               TORCH_BOX(&cute_kernels::binding::fused_attention));
  library.impl("_scaled_dot_product_fused_attention_overrideable_backward",
               TORCH_BOX(&cute_kernels::binding::fused_attention_backward));
}
