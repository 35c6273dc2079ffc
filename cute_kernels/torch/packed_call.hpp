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

/// The (count) numbers of a tensor, checked to be on q's device.
int const* check_int32(char const* name, torch::stable::Tensor const& tensor, Argument const& q,
                       int64_t count);

/// The call that q and k of any number format, packed and with sizes that an int holds, make with
/// them and a V of head_dim_v, checked but for what is known to the device alone. It points into
/// the tensors.
attention::AttentionCall packed_call_of(Argument const& q, Argument const& k, int64_t head_dim_v,
                                        double softmax_scale, attention::MaskSpec const& mask,
                                        PackedCall const& packed);

/// The same of 16-bit q, k and v as the caller gave them, all of it checked.
attention::AttentionCall check_packed_call(Argument const& q, Argument const& k, Argument const& v,
                                           double softmax_scale, attention::MaskSpec const& mask,
                                           PackedCall const& packed);

}  // namespace cute_kernels::binding
