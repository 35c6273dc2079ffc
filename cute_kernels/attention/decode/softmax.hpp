#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {

/// What is known of a row's scores, of some keys or of all.
struct RowStatistics {
  float most;  // -inf: the row sees no key
  float sum;   // of exp(scale * (score - most))
};

/// Online softmax over the rows of a 64 x N accumulator with each row's maximum so far
/// (FlashAttention-2, arXiv 2307.08691, section 3.1). Each thread keeps kRows rows; the four
/// threads of a quad share them. The exponent is scale * (score - maximum), subtracted first: it is
/// never above 0, however large both are. The row sum stays one partial sum a thread until
/// reduce_sums(). A row's maximum is one chain of comparisons, or two of half the length, which
/// take a register more. If kOfUnits, each row's scores may be multiples of a unit for a while.
template <int kRows, int kChains = 1, bool kOfUnits = false>
class RunningSoftmax {
  static_assert(kChains == 1 || kChains == 2);
  static constexpr float kMostUnits = 0x1p32f;
  static constexpr float kLeastScale = 0x1p-96f;

 public:
  /// exp(s) of the softmax is 2^(scale_log2 * s).
  CUTLASS_DEVICE explicit RunningSoftmax(float scale_log2) {
    CUTLASS_PRAGMA_UNROLL
    for (float& scale : scale_log2_) scale = scale_log2;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      most_[row] = -INFINITY;
      sum_[row] = 0.f;
    }
  }

  /// Before the first scores, which are below kMostUnits: those of a row are multiples of `unit`,
  /// which is not negative, and finite as its product with the scale, which is above 0. Until
  /// end_units(), behind the last ones.
  CUTLASS_DEVICE void begin_units(float const (&unit)[kRows]) {
    static_assert(kOfUnits);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      // Of less all that are seen are alike, and those that are not stay at -inf.
      scale_log2_[row] = fmaxf(scale_log2_[row] * unit[row], kLeastScale);
    }
  }
  CUTLASS_DEVICE void end_units(float const (&unit)[kRows], float scale_log2) {
    static_assert(kOfUnits);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (most_[row] != -INFINITY) most_[row] *= unit[row];
      scale_log2_[row] = scale_log2;
    }
  }

  /// Turns a block of scores into P in place. What P V of the blocks before have added up to is to
  /// be multiplied by `factor` before this block's is added; whether that changes anything, in the
  /// thread's warp. Scores may be of the first rows alone.
  template <class Scores>
  CUTLASS_DEVICE bool update(Scores& scores, float (&factor)[kRows]) {
    using namespace cute;
    static_assert(decltype(size<0>(scores))::value <= kRows);
    bool moves = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(scores); ++row) {
      float most = most_[row];
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); col += kChains) most = fmaxf(most, scores(row, col));
      if constexpr (kChains == 2) {
        float of_others = scores(row, 1);  // NaN, if it is all that they are
        CUTLASS_PRAGMA_UNROLL
        for (int col = 3; col < size<1>(scores); col += 2) {
          of_others = fmaxf(of_others, scores(row, col));
        }
        most = fmaxf(most, of_others);
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
      // In a row that has seen no key, not by -inf - -inf, which is NaN.
      float const origin = most == -INFINITY ? 0.f : most;
      factor[row] = sm90::exp2_mufu((most_[row] - origin) * scale_log2(row));
      moves |= most != most_[row];
      float sum = 0.f;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        float const p = sm90::exp2_mufu((scores(row, col) - origin) * scale_log2(row));
        scores(row, col) = p;
        sum += p;
      }
      sum_[row] = sum_[row] * factor[row] + sum;
      most_[row] = most;
    }
    return __any_sync(0xffffffff, moves);
  }

  /// A row's block of another warpgroup's: the maximum is that of its scores, too, and what has
  /// been added up is to be multiplied by `factor`.
  CUTLASS_DEVICE void follow(int row, float most, float factor) {
    most_[row] = most;
    sum_[row] *= factor;
  }

  template <class Output>
  CUTLASS_DEVICE static void scale_rows(Output& out, float const (&factor)[kRows]) {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(out); ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(out); ++col) out(row, col) *= factor[row];
    }
  }

  CUTLASS_DEVICE void reduce_sums() {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 1);
      sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 2);
    }
  }

  /// A row's keys become those of `other`, too, whose sum is reduced. What P V of the own ones and
  /// of the others have added up are to be multiplied by `own` and `others`.
  CUTLASS_DEVICE void join(int row, RowStatistics const& other, float& own, float& others) {
    float const most = fmaxf(most_[row], other.most);
    float const origin = most == -INFINITY ? 0.f : most;
    own = sm90::exp2_mufu((most_[row] - origin) * scale_log2(row));
    others = sm90::exp2_mufu((other.most - origin) * scale_log2(row));
    sum_[row] = sum_[row] * own + other.sum * others;
    most_[row] = most;
  }

  /// Of a row whose maximum of all keys is `most`: what P V of keys whose maximum is `of_some` is
  /// to be multiplied by.
  CUTLASS_DEVICE float weight(int row, float of_some, float most) const {
    float const origin = most == -INFINITY ? 0.f : most;
    return sm90::exp2_mufu((of_some - origin) * scale_log2(row));
  }
  /// A row's keys become those of `all`, reduced.
  CUTLASS_DEVICE void become(int row, RowStatistics const& all) {
    most_[row] = all.most;
    sum_[row] = all.sum;
  }

  /// That of keys whose maximum is the same, reduced.
  CUTLASS_DEVICE void add_sum(int row, float sum) { sum_[row] += sum; }

  /// Reduced.
  CUTLASS_DEVICE RowStatistics statistics(int row) const { return {most_[row], sum_[row]}; }

  CUTLASS_DEVICE float most(int row) const { return most_[row]; }
  CUTLASS_DEVICE float sum(int row) const { return sum_[row]; }

 private:
  CUTLASS_DEVICE float scale_log2(int row) const { return scale_log2_[kOfUnits ? row : 0]; }

  float most_[kRows];
  float sum_[kRows];
  float scale_log2_[kOfUnits ? kRows : 1];
};

/// What the sum of a row's P V is multiplied by to become its output, and the row's LSE, with a
/// sink of the row's head: one score more, whose value is 0. Without one it is -inf.
struct RowResult {
  float factor;
  float lse;

  CUTLASS_DEVICE RowResult(RowStatistics const& row, float scale_log2, float sink) {
    float const sink_log2 = sink * sm90::kLog2e;
    if (row.most == -INFINITY && row.sum == 0.f) {
      factor = 0.f;
      lse = sink;
      return;
    }
    constexpr float kLargest = 3e38f;
    float const most_log2 = row.most * scale_log2;
    // Both may be beyond a float: no infinity is subtracted from itself.
    float const sink_above = sink_log2 - fminf(fmaxf(most_log2, -kLargest), kLargest);
    bool const sink_leads = sink_above > 0.f;
    float const weight = sink_leads ? sm90::exp2_mufu(-sink_above) : 1.f;
    float const sum = row.sum * weight + (sink_leads ? 1.f : sm90::exp2_mufu(sink_above));
    factor = weight / sum;
    lse = ((sink_leads ? sink_log2 : most_log2) + log2f(sum)) * sm90::kLn2;
  }
};

}  // namespace cute_kernels::attention
