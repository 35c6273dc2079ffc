#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/require.hpp"

// What the backward operators share: their arguments, and the launch.
namespace cute_kernels::binding {

/// What a forward pass left, and the gradients of its results.
struct ForwardResults {
  Argument grad_out;
  std::optional<Argument> grad_lse;
  Argument out;
  Argument lse;

  ForwardResults(torch::stable::Tensor const& grad_out,
                 std::optional<torch::stable::Tensor> const& grad_lse,
                 torch::stable::Tensor const& out, torch::stable::Tensor const& lse);

  /// Throws unless they are those of a call of q and v.
  void check(Argument const& q, Argument const& v, std::initializer_list<int64_t> lse_shape) const;
};

/// Tensors of float32 that the gradients of q, k and v are written to, or added to.
struct GivenGradients {
  torch::stable::Tensor const& grad_q;
  torch::stable::Tensor const& grad_k;
  torch::stable::Tensor const& grad_v;
  bool add_to_q;
  bool add_to_kv;

  /// Throws unless they have the shapes of q, k and v.
  void check(Argument const& q, Argument const& k, Argument const& v) const;
};

/// Of q, k, v and the sinks.
using Gradients = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                             torch::stable::Tensor>;

/// Of a call that is checked, as its results are. Without `given` new tensors of the inputs' dtype.
Gradients answer_backward(attention::AttentionCall const& call,
                          attention::BackwardKernel const& kernel, bool deterministic,
                          attention::Device const& device, Argument const& q, Argument const& k,
                          Argument const& v, std::optional<torch::stable::Tensor> const& sinks,
                          ForwardResults const& results, GivenGradients const* given,
                          attention::VariantArguments const* variant = nullptr);

}  // namespace cute_kernels::binding
