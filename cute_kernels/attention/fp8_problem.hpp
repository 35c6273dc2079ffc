#pragma once

#include <cstdint>

#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

/// Scales of a quantised tensor: one float for (batch, head, i), where i counts blocks of rows or
/// channels. A stride of 0 repeats a scale.
struct ScaleView {
  float const* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t stride;
};

/// One call of FP8 attention, forward. Q and K are (batch, seqlen, heads, head_dim), 8 bits an
/// element, V is e4m3 and stands transposed: (batch, heads, head_dim, keys), keys padded with zeros
/// to a multiple of 16 and in the order of `value_key_order` (fp8_traits.hpp). Requirements as in
/// ForwardProblem; head_dim % 16 == 0.
struct Fp8ForwardProblem {
  int batch;
  int seqlen_q;
  int seqlen_k;
  int heads_q;
  int heads_kv;
  int head_dim;
  bool causal;
  bool out_float16;  // O is fp16, otherwise bf16
  bool overlaps;     // may start while the kernel before it ends, which quantises
  float softmax_scale;
  TensorView q;
  TensorView k;
  TensorView v;  // seqlen_stride is the stride of a channel: the padded number of keys or more
  TensorView out;
  ScaleView q_scale;  // a block is 64 rows
  ScaleView k_scale;  // a block is 64 rows
  ScaleView v_scale;  // i is a channel
  float* lse;         // (batch, heads_q, seqlen_q), natural logarithm
  Device device;
};

}  // namespace cute_kernels::attention
