#include "cute_kernels/torch/variant_call.hpp"

#include <algorithm>
#include <limits>

#include "cute_kernels/torch/call.hpp"

namespace cute_kernels::binding {

using attention::AttentionCall;
using attention::BlockLists;
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
    int64_t const stride = a.sizes[axis] == 1 ? 0 : a.strides[axis];  // which nothing is read by
    require(a.sizes[axis] <= kMostOfInt && stride <= kMostOfInt, a.name,
            " has a size or stride of 2^31 or more");
    captured.sizes[axis] = static_cast<int>(a.sizes[axis]);
    captured.strides[axis] = static_cast<int>(stride);
  }
  return captured;
}

void check_list(Argument const& a, Argument const& q, size_t dims) {
  check_device(a, q);
  require(a.dtype == torch::headeronly::ScalarType::Int && a.sizes.size() == dims, a.name,
          " are not int32 of ", dims, " dimensions");
  require(a.tensor.is_contiguous(), a.name, " are not contiguous");
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

BlockLists block_lists_of(std::vector<Tensor> const& lists, Rows rows, AttentionCall const& call,
                          Argument const& q) {
  if (lists.empty()) return {};
  constexpr int kTensors = 5;
  require(lists.size() == kTensors && !call.is_packed(),
          "block_lists are five tensors, of a dense call");
  attention::CallSizes const& sizes = call.sizes;
  bool const of_queries = rows == Rows::kQueries;
  int const length = of_queries ? sizes.seqlen_q : sizes.seqlen_k;
  Tensor const& of_counts = lists[of_queries ? 0 : 2];
  Argument const counts("block_lists' counts", of_counts);
  check_list(counts, q, 3);
  require(counts.size(0) == 1 || counts.size(0) == sizes.batch, counts.name,
          " are of another batch");
  require(counts.size(1) == 1 || counts.size(1) == sizes.heads_q, counts.name,
          " are of other heads");
  int64_t const units = counts.size(2);
  require(units * attention::kMaskUnit >= length, counts.name, " do not reach the last row");
  auto entries = [&](Tensor const& tensor) {
    Argument const a("a block list", tensor);
    check_list(a, q, 4);
    for (int dim = 0; dim < 3; ++dim) {
      require(a.size(dim) == counts.size(dim), a.name, " has not its count's shape");
    }
    return static_cast<int const*>(tensor.data_ptr());
  };
  int64_t const rows_of_batch = counts.size(1) * units,
                capacity = lists[of_queries ? 1 : 3].size(3);
  require(counts.size(0) * rows_of_batch <= kMostOfInt / std::max<int64_t>(1, capacity),
          "block_lists have 2^31 entries or more");
  return {static_cast<int const*>(of_counts.data_ptr()),
          entries(lists[of_queries ? 1 : 3]),
          of_queries ? nullptr : entries(lists[4]),
          counts.size(0) == 1 ? 0 : static_cast<int>(rows_of_batch),
          counts.size(1) == 1 ? 0 : static_cast<int>(units),
          static_cast<int>(capacity)};
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
