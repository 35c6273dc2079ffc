#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {

/// Online softmax over the rows of a 64 x N accumulator, in base 2 (FlashAttention-2, arXiv
/// 2307.08691, section 3.1). Each thread keeps kRows rows; the four threads of a quad share them.
///
/// P is measured from an origin that follows the row's maximum lazily: it moves only when a score
/// passes it by more than kSlack (in powers of two). Until then P is at most 2^kSlack, no thread
/// talks to its quad, and O needs no rescaling. The result is the same softmax: the origin cancels
/// when O is divided by the row sum. The row sum stays one partial sum a thread and is reduced
/// once, in finalize().
template <int kRows>
class OnlineSoftmax {
 public:
  /// scale_log2 = softmax_scale * log2(e): exp(scale * s) = 2^(scale_log2 * s).
  CUTLASS_DEVICE explicit OnlineSoftmax(float scale_log2)
      : scale_log2_(scale_log2), slack_(kSlack / scale_log2) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      origin_[row] = kMinusInf;
      offset_[row] = 0.f;
      sum_[row] = 0.f;
    }
  }

  /// Turns a block of scores into P = 2^(scale_log2 * (s - origin)) in place. Returns, the same to
  /// a whole warp, whether origins moved: then O must be rescaled before this block's P V is added.
  template <class Scores>
  CUTLASS_DEVICE bool update(Scores& scores) {
    using namespace cute;
    static_assert(decltype(size<0>(scores))::value == kRows);
    float block_max[kRows];
    bool passed = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      block_max[row] = scores(row, 0);
      CUTLASS_PRAGMA_UNROLL
      for (int col = 1; col < size<1>(scores); ++col) {
        block_max[row] = fmaxf(block_max[row], scores(row, col));
      }
      passed |= block_max[row] > origin_[row] + slack_;
    }
    bool const moved = __any_sync(0xffffffff, passed);
    if (moved) move_origins(block_max);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        float const exponent = scores(row, col) * scale_log2_ - offset_[row];
        scores(row, col) = sm90::exp2_mufu(exponent);
        sum_[row] += scores(row, col);
      }
    }
    return moved;
  }

  /// Multiplies the rows of O by the factors of the last update() that moved the origins.
  template <class Output>
  CUTLASS_DEVICE void rescale(Output& out) const {
    scale_rows(out, rescale_);
  }

  /// Divides O by the row sums. Rows that saw no key become 0. lse() is valid afterwards.
  template <class Output>
  CUTLASS_DEVICE void finalize(Output& out) {
    float inverse[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 1);
      sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 2);
      inverse[row] = sum_[row] == 0.f ? 0.f : 1.f / sum_[row];
    }
    scale_rows(out, inverse);
  }

  /// ln(sum_j exp(softmax_scale * s_j)); -inf for a row that saw no key.
  CUTLASS_DEVICE float lse(int row) const {
    return sum_[row] == 0.f ? kMinusInf : (offset_[row] + log2f(sum_[row])) * sm90::kLn2;
  }

 private:
  static constexpr float kMinusInf = -INFINITY;
  // 2^8 is far from the largest fp16, and P's rounding error is relative.
  static constexpr float kSlack = 8.f;

  CUTLASS_DEVICE void move_origins(float const (&block_max)[kRows]) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float origin = fmaxf(origin_[row], block_max[row]);
      origin = fmaxf(origin, __shfl_xor_sync(0xffffffff, origin, 1));
      origin = fmaxf(origin, __shfl_xor_sync(0xffffffff, origin, 2));
      // -inf - -inf would be NaN: a row that has seen no key yet measures from 0 and gets P = 0.
      float const finite = origin == kMinusInf ? 0.f : origin;
      rescale_[row] = sm90::exp2_mufu((origin_[row] - finite) * scale_log2_);
      sum_[row] *= rescale_[row];
      offset_[row] = finite * scale_log2_;
      origin_[row] = origin;
    }
  }

  template <class Output>
  CUTLASS_DEVICE static void scale_rows(Output& out, float const (&factor)[kRows]) {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(out); ++col) {
        out(row, col) *= factor[row];
      }
    }
  }

  float scale_log2_;
  float slack_;
  float origin_[kRows];  // -inf until the row has seen a key
  float offset_[kRows];  // origin in powers of two, 0 until then
  float sum_[kRows];
  float rescale_[kRows];
};

}  // namespace cute_kernels::attention
