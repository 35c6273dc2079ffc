#include "cute_kernels/torch/call.hpp"

#include <cmath>
#include <limits>

namespace cute_kernels::binding {

using attention::AttentionCall;
using attention::ElementType;
using attention::MaskSpec;
using torch::headeronly::ScalarType;

namespace {

constexpr int kMaxHeadDim = 256;

void check_alone(Argument const& a) {
  require(a.sizes.size() == 4, a.name, " does not have 4 dimensions");
  require(a.dtype == ScalarType::Half || a.dtype == ScalarType::BFloat16, a.name,
          " is not float16 or bfloat16");
  for (int64_t size : a.sizes) {
    require(size <= std::numeric_limits<int>::max(), a.name, " has a size of 2^31 or more");
  }
  require(a.stride(3) == 1 || a.size(3) == 1, a.name, "'s head_dim is not contiguous");
}

}  // namespace

ElementType element_type(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
}

char const* name_of(ElementType dtype) { return dtype == ElementType::kBFloat16 ? "bf16" : "fp16"; }

char const* name_of(MaskSpec const& mask) {
  if (mask.left || mask.diagonal || mask.right.value_or(0) != 0) return "a window or diagonal";
  return mask.right ? "causal" : "full";
}

MaskSpec mask_of(bool causal, std::optional<int64_t> left, std::optional<int64_t> right,
                 std::optional<int64_t> diagonal) {
  auto as_int = [](std::optional<int64_t> value) -> std::optional<int> {
    if (!value) return std::nullopt;
    require(*value >= std::numeric_limits<int>::min() && *value <= std::numeric_limits<int>::max(),
            "a limit of the mask is not an int");
    return static_cast<int>(*value);
  };
  MaskSpec mask = attention::mask_spec(causal);
  mask.diagonal = as_int(diagonal);
  mask.left = as_int(left);
  if (!causal) mask.right = as_int(right);
  return mask;
}

void check_device(Argument const& a, Argument const& q) {
  require(a.is_cuda && a.device == q.device, a.name, " is not where q is");
}

void check_like(Argument const& a, Argument const& q) {
  check_device(a, q);
  require(a.dtype == q.dtype, a.name, " does not have q's dtype");
}

AttentionCall call_of(Argument const& q, Argument const& k, int64_t head_dim_v,
                      double softmax_scale, MaskSpec const& mask) {
  require(k.size(0) == q.size(0) && k.size(3) == q.size(3),
          "k does not have q's batch and head_dim");
  int64_t const heads_q = q.size(2), heads_kv = k.size(2);
  require(heads_q == 0 || (heads_kv > 0 && heads_q % heads_kv == 0),
          "q's heads are not a multiple of k's");
  float const scale = static_cast<float>(softmax_scale);
  // As float32 it may be 0, which the kernels know how to take.
  require(softmax_scale > 0 && std::isfinite(scale),
          "softmax_scale is not above 0 and finite in float32");
  AttentionCall call{};
  call.sizes.batch = static_cast<int>(q.size(0));
  call.sizes.seqlen_q = static_cast<int>(q.size(1));
  call.sizes.seqlen_k = static_cast<int>(k.size(1));
  call.sizes.heads_q = static_cast<int>(heads_q);
  call.sizes.heads_kv = static_cast<int>(heads_kv);
  call.sizes.head_dim = static_cast<int>(q.size(3));
  call.sizes.head_dim_v = static_cast<int>(head_dim_v);
  call.mask = mask;
  call.scale = scale;
  return call;
}

AttentionCall check_call(Argument const& q, Argument const& k, Argument const& v,
                         double softmax_scale, MaskSpec const& mask) {
  require(q.is_cuda, "q is not on CUDA");
  check_alone(q);
  for (Argument const* a : {&k, &v}) {
    check_like(*a, q);
    check_alone(*a);
  }
  AttentionCall const call = call_of(q, k, v.size(3), softmax_scale, mask);
  int const head_dim = call.sizes.head_dim;
  require(head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0,
          "q's head_dim is not a multiple of 8 up to ", kMaxHeadDim);
  require(call.sizes.head_dim_v == head_dim, "v does not have q's head_dim");
  for (int dim = 0; dim < 3; ++dim) {
    require(v.size(dim) == k.size(dim), "v does not have k's batch, seqlen and heads");
  }
  return call;
}

TileName::TileName(std::optional<StringHandle> handle) : handle_(handle) {
  if (!handle_.has_value()) return;
  size_t size = 0;
  char const* data = nullptr;
  require(torch_string_length(*handle_, &size) == 0 && torch_string_c_str(*handle_, &data) == 0,
          "tile_config cannot be read");
  name_ = {data, size};
}

TileName::~TileName() {
  if (handle_.has_value()) torch_delete_string(*handle_);
}

}  // namespace cute_kernels::binding
