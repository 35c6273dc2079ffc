#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {

/// Online softmax as OnlineSoftmax, for scores that carry a scale for every kScaleRows keys and a P
/// that is rounded to e4m3.
///
/// The scales cost nothing an element: a maximum is taken over each group of columns and scaled
/// once, and the exponent's FMA has another factor in each group. P is 2^kShift times the
/// probability, so that it uses e4m3's range; finalize() and lse() see the same factor in the row
/// sum. kSumP: the row sums are added up here, otherwise set_sum() is told them.
template <int kRows, int kGroups, bool kSumP>
class ScaledSoftmax {
 public:
  CUTLASS_DEVICE ScaledSoftmax() {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      origin_[row] = kMinusInf;
      offset_[row] = -kShift;
      sum_[row] = 0.f;
    }
  }

  /// Turns a block of scores into P in place, given each group's factor to powers of two. Returns,
  /// the same to a whole warp, whether O must be rescaled before this block's P V is added.
  template <class Scores>
  CUTLASS_DEVICE bool update(Scores& scores, float const (&scale)[kGroups]) {
    using namespace cute;
    static_assert(decltype(size<0>(scores))::value == kRows);
    constexpr int kColumns = decltype(size<1>(scores))::value / kGroups;
    float block_max[kRows];
    bool passed = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        float group_max = scores(row, group * kColumns);
        CUTLASS_PRAGMA_UNROLL
        for (int col = 1; col < kColumns; ++col) {
          group_max = fmaxf(group_max, scores(row, group * kColumns + col));
        }
        group_max *= scale[group];
        block_max[row] = group == 0 ? group_max : fmaxf(block_max[row], group_max);
      }
      passed |= block_max[row] > origin_[row] + kSlack;
    }
    bool const moved = __any_sync(0xffffffff, passed);
    if (moved) move_origins(block_max);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        float const exponent = scores(row, col) * scale[col / kColumns] - offset_[row];
        scores(row, col) = sm90::exp2_mufu(exponent);
        if constexpr (kSumP) sum_[row] += scores(row, col);
      }
    }
    return moved;
  }

  /// Multiplies the rows of O by the factors of the last update() that moved the origins.
  template <class Output>
  CUTLASS_DEVICE void rescale(Output& out) const {
    scale_rows(out, rescale_);
  }

  /// Takes a row sum that was computed elsewhere.
  CUTLASS_DEVICE void set_sum(int row, float sum) { sum_[row] = sum; }

  /// Divides O by the row sums. Rows that saw no key become 0. lse() is valid afterwards.
  template <class Output>
  CUTLASS_DEVICE void finalize(Output& out) {
    float inverse[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if constexpr (kSumP) {
        sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 1);
        sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 2);
      }
      inverse[row] = sum_[row] == 0.f ? 0.f : 1.f / sum_[row];
    }
    scale_rows(out, inverse);
  }

  /// ln(sum_j exp(s_j)); -inf for a row that saw no key.
  CUTLASS_DEVICE float lse(int row) const {
    return sum_[row] == 0.f ? kMinusInf : (offset_[row] + log2f(sum_[row])) * sm90::kLn2;
  }

 private:
  static constexpr float kMinusInf = -INFINITY;
  // P is at most 2^(kShift + kSlack), below e4m3's 448. Measured: an origin that follows more
  // loosely loses small P to e4m3's 2^-9.
  static constexpr float kShift = 4.f;
  static constexpr float kSlack = 4.f;

  CUTLASS_DEVICE void move_origins(float const (&block_max)[kRows]) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float origin = fmaxf(origin_[row], block_max[row]);
      origin = fmaxf(origin, __shfl_xor_sync(0xffffffff, origin, 1));
      origin = fmaxf(origin, __shfl_xor_sync(0xffffffff, origin, 2));
      // -inf - -inf would be NaN: a row that has seen no key yet measures from 0 and gets P = 0.
      float const finite = origin == kMinusInf ? 0.f : origin;
      rescale_[row] = sm90::exp2_mufu(origin_[row] - finite);
      if constexpr (kSumP) sum_[row] *= rescale_[row];
      offset_[row] = finite - kShift;
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

  float origin_[kRows];  // in powers of two, -inf until the row has seen a key
  float offset_[kRows];  // origin - kShift
  float sum_[kRows];
  float rescale_[kRows];
};

}  // namespace cute_kernels::attention
