#include "cute_kernels/torch/fp8_call.hpp"

#include <optional>

#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/schedule/work_list.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/fp8_quantize.hpp"
#include "cute_kernels/torch/measured_choice.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {

using attention::AttentionCall;
using attention::CallSizes;
using attention::Fp8ForwardKernel;
using attention::Fp8ForwardProblem;
using attention::ScaleView;
using attention::ScoreType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

/// Scales that may be expanded: of each batch entry or sequence `blocks`, or one. Of packed
/// sequences `blocks` are of all, in one entry.
ScaleView scale_view(Argument const& a, Argument const& q, int64_t batch, int64_t heads,
                     int64_t blocks, bool of_all = false) {
  check_fp8_tensor(a, 3);
  check_device(a, q);
  require(a.dtype == ScalarType::Float, a.name, " is not float32");
  bool const one = a.size(2) == 1 && a.size(0) == batch;
  bool const all = a.size(2) == blocks && a.size(0) == (of_all ? 1 : batch);
  require(a.size(1) == heads && (one || all), a.name, "'s shape does not fit");
  return {static_cast<float const*>(a.tensor.data_ptr()), of_all && !one ? 0 : a.stride(0),
          a.stride(1), one ? 0 : 1};
}

}  // namespace

Fp8ForwardKernel const& fp8_kernel_for(ScoreType type, AttentionCall const& call,
                                       TileName const& tile, bool with_lse) {
  auto const& kernels = attention::fp8_forward_kernels;
  auto const choose = [&] {
    Fp8ForwardKernel const* const usual = automatic_choice(kernels, type, call);
    if (!with_lse || usual == nullptr || usual->config.any_call || !usual->config.linear_exp) {
      return usual;
    }
    Fp8ForwardKernel const* const exact = attention::choose_fitting(kernels, type, call, true);
    return exact == nullptr ? usual : exact;
  };
  return kernel_for(kernels, choose, type, call, tile);
}

Fp8Results empty_fp8_results(AttentionCall const& call, bool out_float16, int device) {
  CallSizes const& sizes = call.sizes;
  ScalarType const dtype = out_float16 ? ScalarType::Half : ScalarType::BFloat16;
  int64_t const rows = attention::tensor_rows_q(call);
  if (call.is_packed()) {
    return {empty({rows, sizes.heads_q, sizes.head_dim_v}, dtype, device),
            empty({sizes.heads_q, rows}, ScalarType::Float, device)};
  }
  return {empty({sizes.batch, rows, sizes.heads_q, sizes.head_dim_v}, dtype, device),
          empty({sizes.batch, sizes.heads_q, rows}, ScalarType::Float, device)};
}

void check_fp8_elements(Fp8Operands const& of, size_t rank) {
  for (Argument const* a : {&of.q, &of.k}) check_fp8_tensor(*a, rank);
  check_fp8_tensor(of.v, rank);
  for (Argument const* a : {&of.k, &of.v}) check_device(*a, of.q);
  require(of.q.dtype == ScalarType::Float8_e4m3fn || of.q.dtype == ScalarType::Char,
          "q is not float8_e4m3fn or int8");
  require(of.k.dtype == of.q.dtype, "k does not have q's dtype");
  require(of.v.dtype == ScalarType::Float8_e4m3fn, "v is not float8_e4m3fn");
  check_fp8_head_dim(of.q, of.q.size(static_cast<int>(rank) - 1));
}

void check_fp8_call_values(Argument const& v, AttentionCall const& call) {
  int const last = static_cast<int>(v.sizes.size()) - 1;
  int64_t const rows = attention::tensor_rows_k(call);
  int64_t const padded = call.is_packed() ? attention::packed_value_keys(rows, call.sizes.batch)
                                          : blocks_of(rows, kKeyPadding) * kKeyPadding;
  require(v.size(last - 2) == call.sizes.heads_kv && v.size(last) == padded &&
              (call.is_packed() || v.size(0) == call.sizes.batch) && v.tensor.is_contiguous(),
          "v is not what quantize_fp8_values gives for k's shape");
  check_fp8_head_dim(v, v.size(last - 1));
}

void check_fp8_tiles(AttentionCall const& call) {
  int64_t const tiles = attention::most_tiles(call, attention::kScaleRows);
  require(static_cast<double>(tiles) * call.sizes.heads_q < kFp8Limit,
          "q has 2^30 blocks of rows or more");
}

void launch_fp8(Fp8ForwardKernel const& kernel, AttentionCall const& call, Fp8Operands const& of,
                Fp8Options const& options, Fp8Results const& results) {
  CallSizes const& sizes = call.sizes;
  attention::Device const device = hopper(of.q.device, options.sm_margin);
  bool const packed = call.is_packed();
  int64_t const rows_q = attention::tensor_rows_q(call), rows_k = attention::tensor_rows_k(call);
  bool const has_keys = rows_k > 0 && of.v.tensor.numel() > 0;
  Tensor const q_readable = tma_readable(of.q, 1);
  Tensor const k_readable =
      has_keys ? tma_readable(of.k, 1) : results.out;  // nothing is read, an address is needed
  Fp8ForwardProblem problem{};
  problem.call = call;
  problem.q = view(q_readable);
  problem.k = view(k_readable);
  problem.v = {results.out.data_ptr(), kKeyPadding, kKeyPadding, kKeyPadding};
  if (has_keys) {
    int const channels = packed ? 1 : 2;
    int64_t const pitch = of.v.size(channels + 1);
    problem.v = {of.v.tensor.data_ptr(), packed ? pitch : of.v.stride(0), pitch,
                 of.v.size(channels) * pitch};
  }
  problem.out = view(results.out);
  problem.lse = static_cast<float*>(results.lse.data_ptr());
  problem.device = device;
  problem.out_float16 = options.out_float16;
  problem.exact_lse = options.exact_lse;
  problem.overlaps = options.overlaps;
  problem.score_offset = options.score_offset;
  auto blocks = [&](int64_t rows) {
    return packed ? attention::blocks_of_all(rows, sizes.batch, attention::kScaleRows)
                  : blocks_of(rows, attention::kScaleRows);
  };
  problem.q_scale =
      scale_view(of.q_scale, of.q, sizes.batch, sizes.heads_q, blocks(rows_q), packed);
  problem.k_scale =
      scale_view(of.k_scale, of.q, sizes.batch, sizes.heads_kv, blocks(rows_k), packed);
  problem.v_scale = scale_view(of.v_scale, of.q, sizes.batch, sizes.heads_kv, sizes.head_dim_v);
  std::optional<Tensor> workspace;
  if (int64_t const bytes = kernel.workspace_bytes(problem)) {
    workspace = empty({bytes}, ScalarType::Byte, of.q.device);
    problem.workspace = workspace->data_ptr();
  }
  require_success(kernel.launch(problem, current_stream(of.q.device)), kernel.config.name);
}

}  // namespace cute_kernels::binding
