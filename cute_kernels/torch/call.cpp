#include "cute_kernels/torch/call.hpp"

#include <cmath>
#include <limits>

namespace cute_kernels::binding {

using attention::ElementType;
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

void check_device(Argument const& a, Argument const& q) {
  require(a.is_cuda && a.device == q.device, a.name, " is not where q is");
}

void check_like(Argument const& a, Argument const& q) {
  check_device(a, q);
  require(a.dtype == q.dtype, a.name, " does not have q's dtype");
}

Call check_call(Argument const& q, Argument const& k, Argument const& v, double softmax_scale,
                bool causal) {
  require(q.is_cuda, "q is not on CUDA");
  check_alone(q);
  for (Argument const* a : {&k, &v}) {
    check_like(*a, q);
    check_alone(*a);
  }
  Call const call{
      {element_type(q.dtype), q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), causal},
      k.size(2)};
  require(call.head_dim >= 8 && call.head_dim <= kMaxHeadDim && call.head_dim % 8 == 0,
          "q's head_dim is not a multiple of 8 up to ", kMaxHeadDim);
  for (Argument const* a : {&k, &v}) {
    require(a->size(0) == call.batch && a->size(3) == call.head_dim, a->name,
            " does not have q's batch and head_dim");
  }
  require(v.size(1) == call.seqlen_k && v.size(2) == call.heads_kv,
          "v does not have k's seqlen and heads");
  require(call.heads_q == 0 || (call.heads_kv > 0 && call.heads_q % call.heads_kv == 0),
          "q's heads are not a multiple of k's");
  // As float32 it may be 0, which the kernels know how to take.
  require(softmax_scale > 0 && std::isfinite(static_cast<float>(softmax_scale)),
          "softmax_scale is not above 0 and finite in float32");
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
