#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {

/// Online softmax over the rows of a 64 x N accumulator, in base 2 (FlashAttention-2, arXiv
/// 2307.08691, section 3.1), without a maximum in the steady state. Each thread keeps kRows rows;
/// the four threads of a quad share them.
///
/// P = 2^(scale_log2 * (s - origin) - shift). A row's origin is its maximum as of the last block
/// that sought it, or above: those in which rows begin, and, once P has become too large, some that
/// follow. In all others P is computed straight from the scores, and its sum, which is needed
/// anyway, tells whether it was small enough: no value is larger than the sum. Otherwise the block
/// starts again from its scores. The result is the same softmax: origin and shift cancel when O is
/// divided by the row sum. The row sum stays one partial sum a thread and is reduced once, in
/// finalize().
///
/// `Range` says what P may be: kShift, an integer, kMargin and kLargest. No P is above kLargest, so
/// that P V is finite where the result is. The last bit of an offset beyond kHuge is no longer
/// small beside P's own rounding.
///
/// The exponent is one FMA: it subtracts the rounded offset, which is wrong by its last bit, for
/// all keys of a row alike. That cancels, too, unless the bit is worth more than P's range. So
/// where an offset is huge, the row's scores become relative to its origin first.
template <int kRows, class Range, bool kSumInPairs>
class OnlineSoftmax {
 public:
  static constexpr bool kHasMargin = Range::kMargin > 0;

  /// scale_log2 = softmax_scale * log2(e): exp(scale * s) = 2^(scale_log2 * s).
  CUTLASS_DEVICE explicit OnlineSoftmax(float scale_log2) : scale_log2_(scale_log2) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      origin_[row] = kMinusInf;
      offset_[row] = kNeverSmall;
      sum_[row] = 0.f;
    }
  }

  /// Turns a block of scores into P in place. Where it is told to `seek` the rows' maxima, it calls
  /// mask() first. Where it is not, it calls exponents(exponentiate), which must call
  /// exponentiate(), or exponentiate(exponent) with a function of score and offset; if P is too
  /// large, overflow(), which must bring the scores back, and seeks them after all. Origins that
  /// few() keys have made, or that did not last, lie above the maximum by a margin. Calls, in a
  /// whole warp, on_move(factors) where origins moved: then the rows of O must be multiplied before
  /// this block's P V is added.
  template <class Scores, class Few, class MaskScores, class Exponents, class Overflow,
            class OnMove>
  CUTLASS_DEVICE void update(Scores& scores, bool seek, Few const& few, MaskScores const& mask,
                             Exponents const& exponents, Overflow const& overflow,
                             OnMove const& on_move) {
    using namespace cute;
    static_assert(decltype(size<0>(scores))::value == kRows);
    float block_sum[kRows];
    if (!seek) {
      exponents([&](auto const&... exponent) { exponentiate(scores, block_sum, exponent...); });
      float largest = block_sum[0];
      CUTLASS_PRAGMA_UNROLL
      for (int row = 1; row < kRows; ++row) largest = fmaxf(largest, block_sum[row]);
      // NaN passes: no origin would mend it, and other rows shall not notice.
      if (!__any_sync(0xffffffff, largest > Range::kLargest)) {
        add(block_sum);
        return;
      }
      overflow();
    } else {
      mask();
    }
    move_origins(scores, !seek || few(), on_move);
    subtract_huge_origins(scores);
    exponentiate(scores, block_sum);
    forbid_huge_offsets();
    add(block_sum);
  }

  /// Whether a row of the warp has seen no key yet.
  CUTLASS_DEVICE bool begins() const {
    bool begins = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) begins |= origin_[row] == kMinusInf;
    return __any_sync(0xffffffff, begins);
  }

  /// Multiplies the rows of O.
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

  /// Divides O by the row sums. Rows that saw no key become 0. lse() is valid afterwards.
  template <class Output>
  CUTLASS_DEVICE void finalize(Output& out) {
    divide(out, [&](int row) { return sum_[row]; });
  }

  /// The same where every row has one score more, `sink`, which is scaled already and has no value.
  /// It may be far from the others, and is -inf where there is none; lse(row, sink) is valid
  /// afterwards.
  template <class Output>
  CUTLASS_DEVICE void finalize(Output& out, float sink) {
    divide(out, [&](int row) {
      // Most calls have none, and need not wait for an exponential.
      return sink == kMinusInf ? sum_[row] : with_sink(row, sink);
    });
  }

  /// With a sink for each row, -inf as any other: the rows' branches would take registers.
  template <class Output>
  CUTLASS_DEVICE void finalize(Output& out, float const (&sinks)[kRows]) {
    divide(out, [&](int row) { return with_sink(row, sinks[row]); });
  }

  /// ln(sum_j exp(softmax_scale * s_j)); -inf for a row that saw no key.
  CUTLASS_DEVICE float lse(int row) const {
    return sum_[row] == 0.f ? kMinusInf : keys(row) * sm90::kLn2;
  }

  /// With the sink in the sum, which is all of it for a row that saw no key.
  CUTLASS_DEVICE float lse(int row, float sink) const {
    if (sink == kMinusInf) return lse(row);
    if (sum_[row] == 0.f) return sink;
    float const above = sink_above_keys(row, sink);
    float const most = above > 0.f ? sink : keys(row) * sm90::kLn2;
    return most + log2f(1.f + sm90::exp2_mufu(-fabsf(above))) * sm90::kLn2;
  }

 private:
  /// log2 of what the keys have in the denominator.
  CUTLASS_DEVICE float keys(int row) const { return offset_of(origin_[row]) + log2f(sum_[row]); }

  /// The row sum, and what the sink adds to it.
  CUTLASS_DEVICE float with_sink(int row, float sink) const {
    return sum_[row] * (1.f + sm90::exp2_mufu(sink_above_keys(row, sink)));
  }

  /// In powers of two, of a row that saw a key. Not by keys(): where offset and sink are large, the
  /// first difference is exact. An offset beyond a float is finite here: without a sink there is
  /// nothing above it, either.
  CUTLASS_DEVICE float sink_above_keys(int row, float sink) const {
    return sink * sm90::kLog2e - fmaxf(offset_of(origin_[row]), kNeverSmall) - log2f(sum_[row]);
  }

  template <class Output, class Denominator>
  CUTLASS_DEVICE void divide(Output& out, Denominator const& denominator) {
    float inverse[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 1);
      sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 2);
      inverse[row] = sum_[row] == 0.f ? 0.f : 1.f / denominator(row);
    }
    scale_rows(out, inverse);
  }

  static constexpr float kMinusInf = -INFINITY;
  // The offset of a row without an origin, or with one that is huge: every P but that of -inf is
  // above any bound.
  static constexpr float kNeverSmall = -3e38f;
  // Powers of two by which a maximum may pass the origin before the origin follows.
  static constexpr float kSlack = 8.f;

  CUTLASS_DEVICE float margin_of_scores() const {
    return fminf(Range::kMargin / scale_log2_, 1e37f);  // finite for every scale
  }

  CUTLASS_DEVICE float offset_of(float origin) const {
    return __fmaf_rn(origin, scale_log2_, Range::kShift);
  }

  /// Scores -> P in place, and the sums of P. In pairs, fewer additions wait for an exponential;
  /// with 128 keys that is slower (docs/tuning.md).
  template <class Scores, class Exponent>
  CUTLASS_DEVICE void exponentiate(Scores& scores, float (&block_sum)[kRows],
                                   Exponent const& exponent) const {
    using namespace cute;
    constexpr int kColumns = decltype(size<1>(scores))::value;
    constexpr int kAddends = kSumInPairs ? 2 : 1;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      block_sum[row] = 0.f;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < kColumns; col += kAddends) {
        float p[kAddends];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAddends; ++i) {
          p[i] = sm90::exp2_mufu(exponent(scores(row, col + i), offset_[row]));
          scores(row, col + i) = p[i];
        }
        block_sum[row] += kAddends == 2 ? p[0] + p[kAddends - 1] : p[0];
      }
    }
  }

  template <class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores, float (&block_sum)[kRows]) const {
    exponentiate(scores, block_sum,
                 [&](float score, float offset) { return score * scale_log2_ - offset; });
  }

  CUTLASS_DEVICE void add(float const (&block_sum)[kRows]) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) sum_[row] += block_sum[row];
  }

  /// Lets the origins follow the maxima of the scores, each row by itself.
  template <class Scores, class OnMove>
  CUTLASS_DEVICE void move_origins(Scores const& scores, bool margin, OnMove const& on_move) {
    using namespace cute;
    float most[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      most[row] = scores(row, 0);
      CUTLASS_PRAGMA_UNROLL
      for (int col = 1; col < size<1>(scores); ++col)
        most[row] = fmaxf(most[row], scores(row, col));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 1; lanes <= 2; ++lanes) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffff, most[row], lanes));
      }
    }
    bool any_moves = false;
    float factor[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float const last = origin_[row];
      // Not by -inf - -inf, which is NaN, in a row that has seen no key yet.
      bool const moves = most[row] > kMinusInf && !((most[row] - last) * scale_log2_ <= kSlack);
      if (kHasMargin && margin) most[row] += margin_of_scores();
      float const offset = offset_of(most[row]);
      float const fall =
          is_huge(offset) ? (last - most[row]) * scale_log2_ : offset_of(last) - offset;
      factor[row] = moves ? sm90::exp2_mufu(fall) : 1.f;
      sum_[row] *= factor[row];
      origin_[row] = moves ? most[row] : last;
      offset_[row] = moves ? offset : offset_[row];
      any_moves |= moves;
    }
    if (__any_sync(0xffffffff, any_moves)) on_move(factor);
  }

  /// Makes scores relative to origins that are huge, for once.
  template <class Scores>
  CUTLASS_DEVICE void subtract_huge_origins(Scores& scores) {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (origin_[row] == kMinusInf || !is_huge(offset_[row])) continue;
      offset_[row] = Range::kShift;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) scores(row, col) -= origin_[row];
    }
  }

  CUTLASS_DEVICE void forbid_huge_offsets() {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (is_huge(offset_of(origin_[row]))) offset_[row] = kNeverSmall;
    }
  }

  CUTLASS_DEVICE static bool is_huge(float offset) { return fabsf(offset) > Range::kHuge; }

  float scale_log2_;
  float origin_[kRows];  // -inf until the row has seen a key
  float offset_[kRows];  // what an FMA subtracts
  float sum_[kRows];
};

}  // namespace cute_kernels::attention
