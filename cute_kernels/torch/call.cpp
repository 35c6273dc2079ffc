#include "cute_kernels/torch/call.hpp"

#include <cmath>
#include <limits>

namespace cute_kernels::binding {

using attention::ElementType;
using torch::headeronly::ScalarType;

namespace {

constexpr int kMaxHeadDim = 256;

void check_alone(Argument const& a) {
  require(a.sizes.size() == 4, a.name, " has shape ", Shape{a.sizes},
          ", must have 4 dimensions: (batch, seqlen, heads, head_dim)");
  require(a.dtype == ScalarType::Half || a.dtype == ScalarType::BFloat16, a.name, " has dtype ",
          DtypeOf{a.dtype}, ", must be float16 or bfloat16 on CUDA");
  for (int64_t size : a.sizes) {
    require(size <= std::numeric_limits<int>::max(), a.name, " has shape ", Shape{a.sizes},
            ", each size must be below 2^31");
  }
  require(a.stride(3) == 1 || a.size(3) == 1, a.name, " has strides ", Shape{a.strides},
          ", its last dimension (head_dim) must be contiguous (stride 1)");
}

}  // namespace

ElementType element_type(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
}

char const* name_of(ElementType dtype) { return dtype == ElementType::kBFloat16 ? "bf16" : "fp16"; }

void check_device(Argument const& a, Argument const& q) {
  require(a.is_cuda && a.device == q.device, a.name, " is on ", DeviceOf{a}, ", must be on ",
          DeviceOf{q}, " like q");
}

void check_like(Argument const& a, Argument const& q) {
  check_device(a, q);
  require(a.dtype == q.dtype, a.name, " has dtype ", DtypeOf{a.dtype}, ", must be ",
          DtypeOf{q.dtype}, " like q");
}

Call check_call(Argument const& q, Argument const& k, Argument const& v, double softmax_scale,
                bool causal) {
  require(q.is_cuda, "q is on ", DeviceOf{q},
          ", must be on a CUDA device like the other arguments");
  check_alone(q);
  for (Argument const* a : {&k, &v}) {
    check_like(*a, q);
    check_alone(*a);
  }
  Call const call{
      {element_type(q.dtype), q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), causal},
      k.size(2)};
  require(call.head_dim >= 8 && call.head_dim <= kMaxHeadDim && call.head_dim % 8 == 0,
          "q has head_dim ", call.head_dim, ", must be a multiple of 8 from 8 to ", kMaxHeadDim);
  for (Argument const* a : {&k, &v}) {
    require(a->size(0) == call.batch, a->name, " has batch ", a->size(0), ", must be ", call.batch,
            " like q");
    require(a->size(3) == call.head_dim, a->name, " has head_dim ", a->size(3), ", must be ",
            call.head_dim, " like q");
  }
  require(v.size(1) == call.seqlen_k, "v has seqlen ", v.size(1), ", must be ", call.seqlen_k,
          " like k");
  require(v.size(2) == call.heads_kv, "v has ", v.size(2), " heads, must have ", call.heads_kv,
          " like k");
  require(call.heads_q == 0 || (call.heads_kv > 0 && call.heads_q % call.heads_kv == 0), "q has ",
          call.heads_q, " heads, must be a multiple of k's ", call.heads_kv);
  float const scale = static_cast<float>(softmax_scale);
  require(std::isfinite(scale) && scale > 0.0f, "softmax_scale is ", softmax_scale,
          ", must be finite and greater than 0");
  return call;
}

}  // namespace cute_kernels::binding
