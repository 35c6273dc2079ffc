#include "cute_kernels/torch/call.hpp"

#include <cmath>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {

using attention::AttentionCall;
using attention::CallSizes;
using attention::ElementType;
using attention::MaskSpec;
using attention::ScoreType;
using torch::headeronly::ScalarType;

namespace {

void check_alone(Argument const& a, size_t rank) {
  require(a.sizes.size() == rank, a.name, " does not have ", rank, " dimensions");
  require(a.dtype == ScalarType::Half || a.dtype == ScalarType::BFloat16, a.name,
          " is not float16 or bfloat16");
  for (int64_t size : a.sizes) {
    require(size <= std::numeric_limits<int>::max(), a.name, " has a size of 2^31 or more");
  }
  int const last = static_cast<int>(rank) - 1;
  require(a.stride(last) == 1 || a.size(last) == 1, a.name, "'s head_dim is not contiguous");
}

}  // namespace

ElementType element_type(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
}

ScoreType score_type(ScalarType dtype) {
  return dtype == ScalarType::Char ? ScoreType::kInt8 : ScoreType::kE4m3;
}

char const* name_of(ElementType dtype) { return dtype == ElementType::kBFloat16 ? "bf16" : "fp16"; }

char const* name_of(ScoreType dtype) { return dtype == ScoreType::kInt8 ? "int8" : "e4m3"; }

char const* name_of(AttentionCall const& call) {
  if (call.is_packed()) return "packed sequences";
  MaskSpec const& mask = call.mask;
  if (mask.left || mask.diagonal || mask.right.value_or(0) != 0) return "a window or diagonal";
  return mask.right ? "causal" : "full";
}

MaskSpec mask_of(bool causal, std::optional<int64_t> left, std::optional<int64_t> right,
                 std::optional<int64_t> diagonal) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  auto limit = [](std::optional<int64_t> value) -> std::optional<int> {
    if (!value || *value > kMost) return std::nullopt;
    require(*value >= 0, "a limit of the window is below 0");
    return static_cast<int>(*value);
  };
  MaskSpec mask;
  if (diagonal) {
    require(*diagonal >= -kMost && *diagonal <= kMost, "diagonal is not an int");
    mask.diagonal = static_cast<int>(*diagonal);
  }
  mask.left = limit(left);
  mask.right = limit(right);
  if (causal) mask.right = 0;
  return mask;
}

void check_device(Argument const& a, Argument const& q) {
  require(a.is_cuda && a.device == q.device, a.name, " is not where q is");
}

void check_like(Argument const& a, Argument const& q) {
  check_device(a, q);
  require(a.dtype == q.dtype, a.name, " does not have q's dtype");
}

Sinks::Sinks(std::optional<torch::stable::Tensor> const& sinks, Argument const& q, int heads) {
  if (!sinks) return;
  Argument const a("sinks", *sinks);
  check_device(a, q);
  require(a.dtype == ScalarType::Float || a.dtype == ScalarType::Half ||
              a.dtype == ScalarType::BFloat16,
          "sinks is not float32, float16 or bfloat16");
  require(a.sizes.size() == 1 && a.size(0) == heads, "sinks does not have a value for each head");
  if (a.dtype == ScalarType::Float && (a.stride(0) == 1 || heads <= 1)) {
    tensor_ = *sinks;
    return;
  }
  tensor_ = empty({heads}, ScalarType::Float, q.device);
  torch::stable::copy_(*tensor_, *sinks);
}

CallSizes sizes_of(int64_t heads_q, int64_t heads_kv, int64_t head_dim, int64_t head_dim_v) {
  require(heads_q == 0 || (heads_kv > 0 && heads_q % heads_kv == 0),
          "q's heads are not a multiple of k's");
  CallSizes sizes{};
  sizes.heads_q = static_cast<int>(heads_q);
  sizes.heads_kv = static_cast<int>(heads_kv);
  sizes.head_dim = static_cast<int>(head_dim);
  sizes.head_dim_v = static_cast<int>(head_dim_v);
  return sizes;
}

float checked_scale(double softmax_scale) {
  float const scale = static_cast<float>(softmax_scale);
  // As float32 it may be 0, which the kernels know how to take.
  require(softmax_scale > 0 && std::isfinite(scale),
          "softmax_scale is not above 0 and finite in float32");
  return scale;
}

float checked_softcap(double softcap) {
  float const cap = static_cast<float>(softcap);
  require(softcap >= 0 && std::isfinite(cap), "softcap is not at least 0 and finite in float32");
  return cap;
}

AttentionCall call_of(Argument const& q, Argument const& k, int64_t head_dim_v,
                      double softmax_scale, MaskSpec const& mask) {
  require(k.size(0) == q.size(0) && k.size(3) == q.size(3),
          "k does not have q's batch and head_dim");
  AttentionCall call{};
  call.sizes = sizes_of(q.size(2), k.size(2), q.size(3), head_dim_v);
  call.sizes.batch = static_cast<int>(q.size(0));
  call.sizes.seqlen_q = static_cast<int>(q.size(1));
  call.sizes.seqlen_k = static_cast<int>(k.size(1));
  call.mask = mask;
  call.scale = checked_scale(softmax_scale);
  return call;
}

void check_inputs(Argument const& q, Argument const& k, Argument const& v, size_t rank) {
  require(q.is_cuda, "q is not on CUDA");
  check_alone(q, rank);
  for (Argument const* a : {&k, &v}) {
    check_like(*a, q);
    check_alone(*a, rank);
  }
  int const rows = static_cast<int>(rank) - 3;
  require(q.size(rows) + k.size(rows) < kRowsLimit, "q and k have 2^31 - 2^10 rows or more");
}

void check_head_dim(char const* name, int64_t head_dim, int64_t most) {
  require(head_dim >= 8 && head_dim <= most && head_dim % 8 == 0, name,
          "'s head_dim is not a multiple of 8 up to ", most);
}

AttentionCall check_call(Argument const& q, Argument const& k, Argument const& v,
                         double softmax_scale, MaskSpec const& mask) {
  check_inputs(q, k, v, 4);
  AttentionCall const call = call_of(q, k, v.size(3), softmax_scale, mask);
  check_head_dim("q", call.sizes.head_dim);
  check_head_dim("v", call.sizes.head_dim_v);
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
