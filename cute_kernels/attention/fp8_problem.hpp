#pragma once

#include <cstdint>

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

/// Rows of Q and K that share a scale.
inline constexpr int kScaleRows = 64;

/// Packed sequences have whole blocks of so many keys in the transposed V: what a kernel's last
/// block of keys reads behind a sequence's last one is its own, and zeros.
inline constexpr int kPackedValueKeys = 128;

constexpr int packed_value_column(int first_row, int entry) {
  return first_block(first_row, entry, kPackedValueKeys) * kPackedValueKeys;
}

/// Of all sequences together.
constexpr int64_t packed_value_keys(int64_t total_k, int64_t batch) {
  return blocks_of_all(total_k, batch, kPackedValueKeys) * kPackedValueKeys;
}

/// Scales of a quantised tensor: one float for (batch, head, i), where i counts blocks of rows or
/// channels. A stride of 0 repeats a scale, otherwise it is 1. Of packed sequences `batch` counts
/// these, and a sequence's blocks of rows begin at first_block() of kScaleRows.
struct ScaleView {
  float const* data;
  int64_t batch_stride;
  int64_t head_stride;
  int stride;
};

/// One call of FP8 attention, forward, and what ForwardProblem says of it. Q and K have 8 bits an
/// element, V is e4m3 and stands transposed: (batch, heads, head_dim_v, keys), keys padded with
/// zeros to a multiple of 16 and in the order of `value_key_order` (fp8_traits.hpp); its
/// seqlen_stride is the stride of a channel, the padded number of keys or more. Of packed sequences
/// it is (heads, head_dim_v, keys of all), where each begins at packed_value_column() and has zeros
/// up to whole kPackedValueKeys. The head dims are multiples of 16.
struct Fp8ForwardProblem : ForwardProblem {
  bool out_float16;  // O is fp16, otherwise bf16
  // Row sums of the kernels with linear_exp are those of rounded P, and so is their LSE; if this is
  // set, those of them with any_call take some time for one that is not.
  bool exact_lse;
  bool overlaps;      // may start while the kernel before it ends, which quantises
  ScaleView q_scale;  // a block is 64 rows
  ScaleView k_scale;  // a block is 64 rows
  ScaleView v_scale;  // i is a channel
  // What all scores of a row are too low by, of the LSE's shape, or null: of calls with any_call.
  float const* score_offset;
};

}  // namespace cute_kernels::attention
