#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {

/// Online softmax over the rows of a 64 x N accumulator, in base 2 (FlashAttention-2, arXiv
/// 2307.08691, section 3.1), without a maximum in the steady state. Each thread keeps kRows rows;
/// the four threads of a quad share them.
///
/// P is measured from an origin, which is the row's maximum over the blocks up to the last one that
/// looked for it: the first, and those that would have made P too large. In all others P is
/// computed straight from the scores, and its sum, which is needed anyway, tells whether it was
/// small enough: no value is larger than the sum. Otherwise the block starts again from its scores.
/// The result is the same softmax: the origin cancels when O is divided by the row sum. The row sum
/// stays one partial sum a thread and is reduced once, in finalize().
template <int kRows>
class OnlineSoftmax {
 public:
  /// scale_log2 = softmax_scale * log2(e): exp(scale * s) = 2^(scale_log2 * s). A thread's P of one
  /// block and row add up to at most `bound`.
  CUTLASS_DEVICE OnlineSoftmax(float scale_log2, float bound)
      : scale_log2_(scale_log2), bound_(bound), settled_(false) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      origin_[row] = kMinusInf;
      offset_[row] = 0.f;
      sum_[row] = 0.f;
    }
  }

  /// Turns a block of scores into P = 2^(scale_log2 * (s - origin)) in place. restore(scores) must
  /// bring the scores back. Calls on_move(), in a whole warp, where origins moved: then O must be
  /// rescaled before this block's P V is added. Rows without an origin get one only if `careful`.
  template <class Scores, class Restore, class OnMove>
  CUTLASS_DEVICE void update(Scores& scores, bool careful, Restore const& restore,
                             OnMove const& on_move) {
    using namespace cute;
    static_assert(decltype(size<0>(scores))::value == kRows);
    float block_sum[kRows];
    if (!careful || settled_) {
      exponentiate(scores, block_sum);
      float largest = block_sum[0];
      CUTLASS_PRAGMA_UNROLL
      for (int row = 1; row < kRows; ++row) largest = sm90::max_nan(largest, block_sum[row]);
      if (__all_sync(0xffffffff, largest <= bound_)) {  // not so if NaN
        add(block_sum);
        return;
      }
      restore(scores);
    }
    move_origins(scores);
    exponentiate(scores, block_sum);
    add(block_sum);
    on_move();
  }

  /// Whether every row of the warp has an origin.
  CUTLASS_DEVICE bool settled() const { return settled_; }

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

  /// Scores -> P in place, and the sums of P: in pairs where a block is short, which lets fewer
  /// additions wait for an exponential. With 128 keys that is slower (docs/tuning.md).
  template <class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores, float (&block_sum)[kRows]) const {
    using namespace cute;
    constexpr int kColumns = decltype(size<1>(scores))::value;
    constexpr int kAddends = kColumns <= 64 / 4 ? 2 : 1;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      block_sum[row] = 0.f;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < kColumns; col += kAddends) {
        float p[kAddends];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAddends; ++i) {
          p[i] = sm90::exp2_mufu(scores(row, col + i) * scale_log2_ - offset_[row]);
          scores(row, col + i) = p[i];
        }
        block_sum[row] += kAddends == 2 ? p[0] + p[kAddends - 1] : p[0];
      }
    }
  }

  CUTLASS_DEVICE void add(float const (&block_sum)[kRows]) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) sum_[row] += block_sum[row];
  }

  template <class Scores>
  CUTLASS_DEVICE void move_origins(Scores const& scores) {
    using namespace cute;
    bool all_saw_a_key = true;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float origin = origin_[row];
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) origin = fmaxf(origin, scores(row, col));
      origin = fmaxf(origin, __shfl_xor_sync(0xffffffff, origin, 1));
      origin = fmaxf(origin, __shfl_xor_sync(0xffffffff, origin, 2));
      // -inf - -inf would be NaN: a row that has seen no key yet measures from 0 and gets P = 0.
      bool const saw_a_key = origin != kMinusInf;
      all_saw_a_key &= saw_a_key;
      float const finite = saw_a_key ? origin : 0.f;
      rescale_[row] = sm90::exp2_mufu((origin_[row] - finite) * scale_log2_);
      sum_[row] *= rescale_[row];
      offset_[row] = finite * scale_log2_;
      origin_[row] = origin;
    }
    settled_ = __all_sync(0xffffffff, all_saw_a_key);
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
  float bound_;
  bool settled_;         // every row of the warp has an origin
  float origin_[kRows];  // -inf until the row has seen a key
  float offset_[kRows];  // origin in powers of two, 0 until then
  float sum_[kRows];
  float rescale_[kRows];
};

}  // namespace cute_kernels::attention
