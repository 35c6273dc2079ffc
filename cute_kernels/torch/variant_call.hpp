#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/variant/arguments.hpp"
#include "cute_kernels/torch/packed_call.hpp"
#include "cute_kernels/torch/require.hpp"

namespace cute_kernels::binding {

/// The call that q, k and v make with a variant, dense without cu_seqlens. Fills `variant` with
/// what the hooks are told; that dtypes and shapes of captured tensors are the variant's is its
/// caller's to know (python/cute_kernels/variants/checks.py).
attention::AttentionCall check_variant_call(Argument const& q, Argument const& k, Argument const& v,
                                            std::optional<PackedCall> const& packed,
                                            std::vector<torch::stable::Tensor> const& captured,
                                            std::vector<double> const& numbers,
                                            double softmax_scale, attention::MaskSpec const& mask,
                                            attention::VariantArguments& variant);

/// The arguments of the variants' operators that say where sequences lie, or nothing.
std::optional<PackedCall> packed_call_of(std::optional<torch::stable::Tensor> const& cu_seqlens_q,
                                         std::optional<torch::stable::Tensor> const& cu_seqlens_k,
                                         std::optional<torch::stable::Tensor> const& seqused_q,
                                         std::optional<torch::stable::Tensor> const& seqused_k,
                                         std::optional<torch::stable::Tensor> const& diagonal,
                                         std::optional<int64_t> max_seqlen_q,
                                         std::optional<int64_t> max_seqlen_k);

}  // namespace cute_kernels::binding
