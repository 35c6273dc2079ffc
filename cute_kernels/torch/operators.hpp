#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace cute_kernels::binding {

/// The CUDA implementations of the operators of these names: output and LSE, gradients of q, k, v.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> flash_attn_forward(
    torch::stable::Tensor const& q, torch::stable::Tensor const& k, torch::stable::Tensor const& v,
    double softmax_scale, bool causal, int64_t tile_config, bool deterministic);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> flash_attn_backward(
    torch::stable::Tensor const& grad_out, std::optional<torch::stable::Tensor> grad_lse,
    torch::stable::Tensor const& q, torch::stable::Tensor const& k, torch::stable::Tensor const& v,
    torch::stable::Tensor const& out, torch::stable::Tensor const& lse, double softmax_scale,
    bool causal, bool deterministic, int64_t tile_config);

}  // namespace cute_kernels::binding
