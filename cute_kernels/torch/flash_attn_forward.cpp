#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/require.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {
namespace {

using attention::ForwardKernel;
using attention::ForwardProblem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ForwardKernel const& forward_kernel_for(Call const& call, TileName const& tile,
                                        int multiprocessors) {
  auto const choose = [&] { return attention::choose_forward(call, multiprocessors); };
  return kernel_for(attention::forward_kernels, choose, call, tile);
}

/// `deterministic` is for the gradient; the forward pass always is.
std::tuple<Tensor, Tensor> flash_attn_forward(Tensor const& q_tensor, Tensor const& k_tensor,
                                              Tensor const& v_tensor, double softmax_scale,
                                              bool causal, std::optional<StringHandle> tile_config,
                                              [[maybe_unused]] bool deterministic,
                                              std::optional<int64_t> window_left,
                                              std::optional<int64_t> window_right,
                                              std::optional<int64_t> diagonal) {
  TileName const tile(tile_config);
  refuse_windows(window_left, window_right, diagonal);
  Argument const q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
  Call const call = check_call(q, k, v, softmax_scale, causal);
  attention::Device const& device = hopper(q.device);
  ForwardKernel const& kernel = forward_kernel_for(call, tile, device.multiprocessors);
  int64_t const query_blocks = (call.seqlen_q + kernel.config.tile_m - 1) / kernel.config.tile_m;
  require(static_cast<double>(call.batch) * call.heads_q * query_blocks < double{1 << 30},
          "q has 2^30 blocks or more");

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

/// The automatic choice, for those who want to know it: a row's name.
std::string choose_tile_config(ScalarType dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                               int64_t heads, int64_t head_dim, bool causal,
                               int64_t multiprocessors) {
  require(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "dtype is ", DtypeOf{dtype},
          ", must be float16 or bfloat16");
  require(seqlen_q > 0 && multiprocessors > 0, "seqlen_q is ", seqlen_q, " and multiprocessors is ",
          multiprocessors, ", both must be above 0");
  Call const call{{element_type(dtype), batch, seqlen_q, seqlen_k, heads, head_dim, causal}, heads};
  TileName const automatic(std::nullopt);
  return forward_kernel_for(call, automatic, static_cast<int>(multiprocessors)).config.name;
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY(cute_kernels, library) {
  library.def(
      "flash_attn_forward(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, "
      "str? tile_config=None, bool deterministic=False, *, SymInt? window_left=None, "
      "SymInt? window_right=None, SymInt? diagonal=None) -> (Tensor out, Tensor lse)");
  library.def(
      "choose_tile_config(ScalarType dtype, int batch, int seqlen_q, int seqlen_k, int heads, int "
      "head_dim, bool causal, int multiprocessors) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("flash_attn_forward", TORCH_BOX(&cute_kernels::binding::flash_attn_forward));
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CompositeExplicitAutograd, library) {
  library.impl("choose_tile_config", TORCH_BOX(&cute_kernels::binding::choose_tile_config));
}
