#pragma once

#include <cstdint>
#include <optional>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/torch/require.hpp"

namespace cute_kernels::binding {

/// The arguments of the varlen operators that say where sequences lie.
struct PackedCall {
  torch::stable::Tensor const& cu_seqlens_q;
  torch::stable::Tensor const& cu_seqlens_k;
  std::optional<torch::stable::Tensor> const& seqused_q;
  std::optional<torch::stable::Tensor> const& seqused_k;
  std::optional<torch::stable::Tensor> const& diagonal;
  std::optional<int64_t> max_seqlen_q;
  std::optional<int64_t> max_seqlen_k;
};

/// The call that 16-bit q, k and v, packed, make with them, checked but for what is known to the
/// device alone. It points into the tensors.
attention::AttentionCall check_packed_call(Argument const& q, Argument const& k, Argument const& v,
                                           double softmax_scale, attention::MaskSpec const& mask,
                                           PackedCall const& packed);

}  // namespace cute_kernels::binding
