#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/require.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {
namespace {

using attention::ElementType;
using attention::ForwardKernel;
using attention::ForwardProblem;
using attention::kForwardRegistry;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kElementBytes = 2;
constexpr int kMaxHeadDim = 256;

char const* name_of(ElementType dtype) { return dtype == ElementType::kBFloat16 ? "bf16" : "fp16"; }

/// q, k and v as the caller gave them, checked.
struct Call : attention::ForwardShape {
  int64_t heads_kv;
};

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

void check_like(Argument const& a, Argument const& q) {
  require(a.is_cuda && a.device == q.device, a.name, " is on ", DeviceOf{a}, ", must be on ",
          DeviceOf{q}, " like q");
  require(a.dtype == q.dtype, a.name, " has dtype ", DtypeOf{a.dtype}, ", must be ",
          DtypeOf{q.dtype}, " like q");
}

Call check(Argument const& q, Argument const& k, Argument const& v, double softmax_scale,
           bool causal) {
  require(q.is_cuda, "q is on ", DeviceOf{q},
          ", must be on a CUDA device like the other arguments");
  check_alone(q);
  for (Argument const* a : {&k, &v}) {
    check_like(*a, q);
    check_alone(*a);
  }
  auto const dtype =
      q.dtype == ScalarType::BFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
  Call const call{{dtype, q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), causal},
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

[[noreturn]] void fail_no_kernel(Call const& call) {
  std::ostringstream there;
  for (ForwardKernel const& kernel : kForwardRegistry) there << ' ' << kernel.config.name;
  fail("no kernel for ", name_of(call.dtype), ", head_dim ", call.head_dim, ", ",
       call.causal ? "causal" : "full", " in this build, which has", there.str());
}

ForwardKernel const& kernel_for(Call const& call, int64_t tile_config, int multiprocessors) {
  if (tile_config == -1) {
    ForwardKernel const* chosen = attention::choose_forward(call, multiprocessors);
    if (chosen == nullptr) fail_no_kernel(call);
    return *chosen;
  }
  require(tile_config >= 0 && tile_config < kForwardRegistry.count, "tile_config is ", tile_config,
          ", must be -1 (automatic) or an index below ", kForwardRegistry.count);
  ForwardKernel const& kernel = kForwardRegistry.kernels[tile_config];
  require(kernel.config.dtype == call.dtype && kernel.config.head_dim >= call.head_dim,
          "tile_config ", tile_config, " (", kernel.config.name, ") takes ",
          name_of(kernel.config.dtype), " with head_dim up to ", kernel.config.head_dim,
          ", but q is ", name_of(call.dtype), " with head_dim ", call.head_dim);
  return kernel;
}

std::tuple<Tensor, Tensor> flash_attn_forward(Tensor const& q_tensor, Tensor const& k_tensor,
                                              Tensor const& v_tensor, double softmax_scale,
                                              bool causal, int64_t tile_config) {
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  Call const call = check(q, k, v, softmax_scale, causal);
  attention::Device const& device = hopper(q.device);
  ForwardKernel const& kernel = kernel_for(call, tile_config, device.multiprocessors);
  int64_t const query_blocks = (call.seqlen_q + kernel.config.tile_m - 1) / kernel.config.tile_m;
  require(static_cast<double>(call.batch) * call.heads_q * query_blocks < double{1 << 30},
          "q has shape ", Shape{q.sizes}, ", batch * heads * blocks of ", kernel.config.tile_m,
          " queries must be below 2^30");

  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Tensor out = empty(4, q.sizes.data(), q.dtype, q.device);
  int64_t const lse_sizes[] = {call.batch, call.heads_q, call.seqlen_q};
  Tensor lse = empty(3, lse_sizes, ScalarType::Float, q.device);
  if (call.batch == 0 || call.heads_q == 0 || call.seqlen_q == 0) return {out, lse};

  // The copies, if any, live until the launch is enqueued: the allocator reuses memory in stream
  // order.
  bool const has_keys = call.seqlen_k > 0;
  Tensor const q_readable = tma_readable(q, kElementBytes);
  Tensor const k_readable = has_keys
                                ? tma_readable(k, kElementBytes)
                                : out;  // without keys nothing is read, but an address is needed
  Tensor const v_readable = has_keys ? tma_readable(v, kElementBytes) : out;
  ForwardProblem const problem{static_cast<int>(call.batch),
                               static_cast<int>(call.seqlen_q),
                               static_cast<int>(call.seqlen_k),
                               static_cast<int>(call.heads_q),
                               static_cast<int>(call.heads_kv),
                               static_cast<int>(call.head_dim),
                               causal,
                               static_cast<float>(softmax_scale),
                               view(q_readable),
                               view(k_readable),
                               view(v_readable),
                               view(out),
                               static_cast<float*>(lse.data_ptr()),
                               device};
  require_success(kernel.launch(problem, current_stream(q.device)), kernel.config.name);
  return {out, lse};
}

/// The automatic choice, for those who want to know it: an index into the registry.
int64_t choose_tile_config(ScalarType dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                           int64_t heads, int64_t head_dim, bool causal, int64_t multiprocessors) {
  require(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "dtype is ", DtypeOf{dtype},
          ", must be float16 or bfloat16");
  require(seqlen_q > 0 && multiprocessors > 0, "seqlen_q is ", seqlen_q, " and multiprocessors is ",
          multiprocessors, ", both must be above 0");
  auto const element =
      dtype == ScalarType::BFloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
  Call const call{{element, batch, seqlen_q, seqlen_k, heads, head_dim, causal}, heads};
  return &kernel_for(call, -1, static_cast<int>(multiprocessors)) - kForwardRegistry.begin();
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY(cute_kernels, library) {
  library.def(
      "flash_attn_forward(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, int "
      "tile_config) -> "
      "(Tensor out, Tensor lse)");
  library.def(
      "choose_tile_config(ScalarType dtype, int batch, int seqlen_q, int seqlen_k, int heads, int "
      "head_dim, bool causal, int multiprocessors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("flash_attn_forward", TORCH_BOX(&cute_kernels::binding::flash_attn_forward));
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CompositeExplicitAutograd, library) {
  library.impl("choose_tile_config", TORCH_BOX(&cute_kernels::binding::choose_tile_config));
}
