#include "cute_kernels/torch/variant_call.hpp"

#include <algorithm>
#include <limits>

#include "cute_kernels/torch/call.hpp"

namespace cute_kernels::binding {

using attention::AttentionCall;
using attention::CapturedTensor;
using attention::VariantArguments;
using torch::stable::Tensor;

namespace {

constexpr int64_t kMostOfInt = std::numeric_limits<int>::max();

CapturedTensor captured_tensor(Tensor const& tensor, Argument const& q) {
  Argument const a("a captured tensor", tensor);
  check_device(a, q);
  require(a.sizes.size() <= attention::kMostAxes, a.name, " has more than ", attention::kMostAxes,
          " dimensions");
  CapturedTensor captured{tensor.data_ptr(), {}, {}};
  for (size_t axis = 0; axis < a.sizes.size(); ++axis) {
    require(a.sizes[axis] <= kMostOfInt && a.strides[axis] <= kMostOfInt, a.name,
            " has a size or stride of 2^31 or more");
    captured.sizes[axis] = static_cast<int>(a.sizes[axis]);
    captured.strides[axis] = static_cast<int>(a.strides[axis]);
  }
  return captured;
}

int as_int(double number) {
  double const least = std::numeric_limits<int>::min(), most = kMostOfInt;
  return number >= least && number <= most ? static_cast<int>(number) : 0;
}

}  // namespace

AttentionCall check_variant_call(Argument const& q, Argument const& k, Argument const& v,
                                 std::optional<PackedCall> const& packed,
                                 std::vector<Tensor> const& captured,
                                 std::vector<double> const& numbers, double softmax_scale,
                                 attention::MaskSpec const& mask, VariantArguments& variant) {
  AttentionCall call = packed ? check_packed_call(q, k, v, softmax_scale, mask, *packed)
                              : check_call(q, k, v, softmax_scale, mask);
  call.has_variant = true;
  require(captured.size() <= attention::kMostCaptured && numbers.size() <= attention::kMostCaptured,
          "more than ", attention::kMostCaptured, " captured tensors or numbers");
  variant.scale = call.scale;
  variant.most_queries = std::max(1, call.sizes.seqlen_q);
  variant.most_keys = std::max(1, call.sizes.seqlen_k);
  if (packed) {
    variant.cu_seqlens_q = call.packed.cu_seqlens_q;
    variant.cu_seqlens_k = call.packed.cu_seqlens_k;
    variant.sequences = call.sizes.batch;
  }
  for (size_t i = 0; i < captured.size(); ++i) variant.tensors[i] = captured_tensor(captured[i], q);
  for (size_t i = 0; i < numbers.size(); ++i) {
    variant.numbers[i] = {static_cast<float>(numbers[i]), as_int(numbers[i])};
  }
  return call;
}

std::optional<PackedCall> packed_call_of(std::optional<Tensor> const& cu_seqlens_q,
                                         std::optional<Tensor> const& cu_seqlens_k,
                                         std::optional<Tensor> const& seqused_q,
                                         std::optional<Tensor> const& seqused_k,
                                         std::optional<Tensor> const& diagonal,
                                         std::optional<int64_t> max_seqlen_q,
                                         std::optional<int64_t> max_seqlen_k) {
  require(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "one of the cu_seqlens is missing");
  if (!cu_seqlens_q) return std::nullopt;
  return PackedCall{*cu_seqlens_q, *cu_seqlens_k, seqused_q,   seqused_k,
                    diagonal,      max_seqlen_q,  max_seqlen_k};
}

}  // namespace cute_kernels::binding
