#pragma once

#include <cstdint>

#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

/// Scales of a quantised tensor: one float for (batch, head, i), where i counts blocks of rows or
/// channels. A stride of 0 repeats a scale, otherwise it is 1.
struct ScaleView {
  float const* data;
  int64_t batch_stride;
  int64_t head_stride;
  int stride;
};

/// One call of FP8 attention, forward, and what ForwardProblem says of it. Q and K have 8 bits an
/// element, V is e4m3 and stands transposed: (batch, heads, head_dim_v, keys), keys padded with
/// zeros to a multiple of 16 and in the order of `value_key_order` (fp8_traits.hpp); its
/// seqlen_stride is the stride of a channel, the padded number of keys or more. The head dims are
/// multiples of 16.
struct Fp8ForwardProblem : ForwardProblem {
  bool out_float16;   // O is fp16, otherwise bf16
  bool overlaps;      // may start while the kernel before it ends, which quantises
  ScaleView q_scale;  // a block is 64 rows
  ScaleView k_scale;  // a block is 64 rows
  ScaleView v_scale;  // i is a channel
};

}  // namespace cute_kernels::attention
