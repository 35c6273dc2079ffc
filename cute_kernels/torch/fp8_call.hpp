#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/fp8_tile_config.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/require.hpp"

// What the FP8 operators that attend share: the checks of quantised tensors, and the launch.
namespace cute_kernels::binding {

struct Fp8Results {
  torch::stable::Tensor out;
  torch::stable::Tensor lse;
};

/// Not initialised, of a call that was checked.
Fp8Results empty_fp8_results(attention::AttentionCall const& call, bool out_float16, int device);

/// Quantised tensors and their scales, as the operators have them.
struct Fp8Operands {
  Argument q;
  Argument k;
  Argument v;
  Argument q_scale;
  Argument k_scale;
  Argument v_scale;
};

/// Throws unless q, k and v alone are such tensors.
void check_fp8_elements(Fp8Operands const& of, size_t rank);

/// Throws unless V is what the quantiser makes of the call's.
void check_fp8_call_values(Argument const& v, attention::AttentionCall const& call);

void check_fp8_tiles(attention::AttentionCall const& call);

/// `with_lse`: one whose LSE is exact.
attention::Fp8ForwardKernel const& fp8_kernel_for(attention::ScoreType type,
                                                  attention::AttentionCall const& call,
                                                  TileName const& tile, bool with_lse);

/// What is not a quantised tensor.
struct Fp8Options {
  bool out_float16;
  bool exact_lse;
  bool overlaps = false;  // it comes right behind the kernels that quantise the operands
  float const* score_offset = nullptr;
  int64_t sm_margin = 0;
};

void launch_fp8(attention::Fp8ForwardKernel const& kernel, attention::AttentionCall const& call,
                Fp8Operands const& of, Fp8Options const& options, Fp8Results const& results);

}  // namespace cute_kernels::binding
