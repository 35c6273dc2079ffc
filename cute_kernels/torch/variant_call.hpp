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

/// What the rows of a block mask's lists are: forward asks for queries', backward for keys'.
enum class Rows { kQueries, kKeys };

/// Those of a dense call's block mask, from the five tensors that the variants' operators have of
/// it (BlockLists of python/cute_kernels/variants/block_mask.py), or nothing without any.
attention::BlockLists block_lists_of(std::vector<torch::stable::Tensor> const& lists, Rows rows,
                                     attention::AttentionCall const& call, Argument const& q);

/// The arguments of the variants' operators that say where sequences lie, or nothing.
std::optional<PackedCall> packed_call_of(std::optional<torch::stable::Tensor> const& cu_seqlens_q,
                                         std::optional<torch::stable::Tensor> const& cu_seqlens_k,
                                         std::optional<torch::stable::Tensor> const& seqused_q,
                                         std::optional<torch::stable::Tensor> const& seqused_k,
                                         std::optional<torch::stable::Tensor> const& diagonal,
                                         std::optional<int64_t> max_seqlen_q,
                                         std::optional<int64_t> max_seqlen_k);

}  // namespace cute_kernels::binding
