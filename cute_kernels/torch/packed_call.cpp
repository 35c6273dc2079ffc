#include "cute_kernels/torch/packed_call.hpp"

#include <algorithm>
#include <limits>

#include "cute_kernels/torch/call.hpp"

namespace cute_kernels::binding {

using attention::AttentionCall;
using attention::CallSizes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int const* check_int32(char const* name, Tensor const& tensor, Argument const& q, int64_t count) {
  Argument const a(name, tensor);
  check_device(a, q);
  require(a.dtype == ScalarType::Int, name, " is not int32");
  require(a.sizes.size() == 1, name, " does not have 1 dimension");
  require(a.stride(0) == 1 || a.size(0) <= 1, name, " is not contiguous");
  require(a.size(0) == count, name, " does not have ", count, " elements");
  return static_cast<int const*>(tensor.data_ptr());
}

namespace {

/// No sequence is longer.
int longest(std::optional<int64_t> max_seqlen, int64_t total) {
  require(!max_seqlen || *max_seqlen >= 0, "a max_seqlen is below 0");
  return static_cast<int>(std::min(max_seqlen.value_or(total), total));
}

}  // namespace

AttentionCall packed_call_of(Argument const& q, Argument const& k, int64_t head_dim_v,
                             double softmax_scale, attention::MaskSpec const& mask,
                             PackedCall const& packed) {
  require(k.size(2) == q.size(2), "k does not have q's head_dim");
  int64_t const starts = packed.cu_seqlens_q.numel();
  require(starts > 0 && starts <= std::numeric_limits<int>::max(),
          "cu_seqlens_q does not have batch + 1 elements");
  auto of_sequences = [&](char const* name, std::optional<Tensor> const& tensor) {
    return tensor ? check_int32(name, *tensor, q, starts - 1) : nullptr;
  };
  AttentionCall call{};
  call.sizes = sizes_of(q.size(1), k.size(1), q.size(2), head_dim_v);
  call.sizes.batch = static_cast<int>(starts - 1);
  call.sizes.seqlen_q = longest(packed.max_seqlen_q, q.size(0));
  call.sizes.seqlen_k = longest(packed.max_seqlen_k, k.size(0));
  call.mask = mask;
  call.scale = checked_scale(softmax_scale);
  call.packed = {check_int32("cu_seqlens_q", packed.cu_seqlens_q, q, starts),
                 check_int32("cu_seqlens_k", packed.cu_seqlens_k, q, starts),
                 of_sequences("seqused_q", packed.seqused_q),
                 of_sequences("seqused_k", packed.seqused_k),
                 of_sequences("diagonal", packed.diagonal),
                 static_cast<int>(q.size(0)),
                 static_cast<int>(k.size(0))};
  return call;
}

AttentionCall check_packed_call(Argument const& q, Argument const& k, Argument const& v,
                                double softmax_scale, attention::MaskSpec const& mask,
                                PackedCall const& packed) {
  check_inputs(q, k, v, 3);
  check_head_dim("q", q.size(2));
  check_head_dim("v", v.size(2));
  require(v.size(0) == k.size(0) && v.size(1) == k.size(1), "v does not have k's total and heads");
  return packed_call_of(q, k, v.size(2), softmax_scale, mask, packed);
}

}  // namespace cute_kernels::binding
