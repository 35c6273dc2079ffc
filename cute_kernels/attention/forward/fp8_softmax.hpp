#pragma once

#include <cutlass/numeric_conversion.h>
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
/// sum. kShift is an integer: the largest P of a row is exact.
///
/// Maxima are taken of the scores' bits as integers, three at a time, unless exponentials bind
/// anyway. That is right unless all are negative, which does not matter until the origin itself is:
/// then, and when it moves, they are taken again. Scores of int8 come with kMagic added, so that
/// their bits are floats without a conversion; they are never negative.
///
/// Linear exponential (Traits::kLinearExp): e4m3's bits are 8 (x + 7) where P = 2^x is a power of
/// two, and are taken to be that in between, less kLinearBias. An FMA and half a conversion to
/// bytes are all that an element of P takes: no exponential (16 results a clock and SM, as long as
/// 512 FLOP), no addition for the row sum, which comes from the tensor cores. P is off by at most
/// 0.35 of e4m3's last bit before it is rounded, and its sum by the same. An exact LSE, where one
/// is wanted, takes the exponentials after all, for a sum of their own.
template <class Traits>
class ScaledSoftmax {
  static constexpr int kRows = 2;
  static constexpr int kGroups = Traits::kScaleGroups;
  static constexpr int kColumns = Traits::kTileN / 4 / kGroups;  // of a thread, in a group
  static constexpr bool kInteger = Traits::kIntegerScores;
  static constexpr bool kIntegerMaxima = kInteger || Traits::kLinearExp;
  static constexpr bool kHasExactSum = Traits::kAnyCall && Traits::kLinearExp;

 public:
  CUTLASS_DEVICE ScaledSoftmax() {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      origin_[row] = kMinusInf;
      offset_[row] = -kShift;
      sum_[row] = 0.f;
    }
  }

  /// Turns a block of scores into what pack() takes in place, given each group's factor to powers
  /// of two. Calls on_move(), in a whole warp, where O must be rescaled before this block's P V is
  /// added. kFirst: known to be the row's first block.
  template <bool kFirst, class Scores, class OnMove>
  CUTLASS_DEVICE void update(Scores& scores, float const (&scale)[kGroups], OnMove const& on_move,
                             bool exact_lse = false) {
    using namespace cute;
    static_assert(decltype(size<0>(scores))::value == kRows);
    static_assert(decltype(size<1>(scores))::value == kColumns * kGroups);
    float block_max[kRows];
    bool passed = is_huge_ || has_huge_factor(scale);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      block_max[row] =
          kIntegerMaxima ? integer_maximum(scores, row, scale) : float_maximum(scores, row, scale);
      passed |= !(block_max[row] <= origin_[row] + kSlack);  // so does NaN
    }
    bool const moved = kFirst || __any_sync(0xffffffff, passed);
    if (moved) {
      if constexpr (kIntegerMaxima && !kInteger) {
        CUTLASS_PRAGMA_UNROLL
        for (int row = 0; row < kRows; ++row) block_max[row] = float_maximum(scores, row, scale);
      }
      move_origins(block_max, scale, scores);
      on_move();
    }
    if (kHasExactSum && exact_lse) add_to_exact_sum(scores, scale);
    CUTLASS_PRAGMA_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        // Rounded so that P is not too large.
        float const offset = kInteger
                                 ? __fmaf_ru(is_huge_ ? 0.f : kMagic, scale[group], offset_[row])
                                 : offset_[row];
        float const bits_scale = scale[group] * 8;
        float const bits_offset = __fsub_rd(kLinearBias, offset) * 8;
        CUTLASS_PRAGMA_UNROLL
        for (int col = group * kColumns; col < (group + 1) * kColumns; ++col) {
          float& score = scores(row, col);
          if constexpr (Traits::kLinearExp) {
            score = score * bits_scale + bits_offset;
          } else {
            score = sm90::exp2_mufu(score * scale[group] - offset);
            sum_[row] += score;
          }
        }
      }
    }
  }

  /// Rounds what update() left to e4m3, into the A operand's registers. Registers of 4 keys each:
  /// first the row, then the half of 32 keys; V's key order fits to it (value_key_order).
  template <class Scores, class Probabilities>
  CUTLASS_DEVICE static void pack(Scores const& scores, Probabilities& probabilities) {
    using namespace cute;
    auto words = recast<uint32_t>(probabilities);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(words); ++i) {
      int const first =
          i / 2 * 8 + i % 2 * 2;  // a run of 16 keys is two runs of 8 in the accumulator
      if constexpr (Traits::kLinearExp) {
        words(i) = sm90::round_to_bytes<uint8_t>(scores(first), scores(first + 1),
                                                 scores(first + 4), scores(first + 5));
      } else {
        cutlass::Array<float, 4> const keys{scores(first), scores(first + 1), scores(first + 4),
                                            scores(first + 5)};
        auto const p = cutlass::NumericArrayConverter<cutlass::float_e4m3_t, float, 4>{}(keys);
        words(i) = reinterpret_cast<uint32_t const&>(p);
      }
    }
  }

  /// Multiplies the rows of O by the factors of the last update() that moved the origins.
  template <class Output>
  CUTLASS_DEVICE void rescale(Output& out) const {
    scale_rows(out, rescale_);
  }

  CUTLASS_DEVICE auto const& rescale_factors() const { return rescale_; }

  /// Takes a block's row sum that was computed elsewhere.
  CUTLASS_DEVICE void add_sum(int row, float sum) { sum_[row] += sum; }

  /// All scores of a row are higher by this, which only a sink and the LSE see.
  CUTLASS_DEVICE void add_offset(int row, float offset) { score_offset_[row] = offset; }

  /// Divides O by the row sums. Rows that saw no key become 0. lse() is valid afterwards.
  template <class Output>
  CUTLASS_DEVICE void finalize(Output& out) {
    divide(out, [&](int row) { return sum_[row]; });
  }

  /// The same where every row has one score more, `sink`, which has no value: -inf where there is
  /// none. lse(row, sink) is valid afterwards.
  template <class Output>
  CUTLASS_DEVICE void finalize(Output& out, float sink) {
    divide(out, [&](int row) {
      // Most calls have none, and need not wait for that.
      if (sink == kMinusInf) return sum_[row];
      return sum_[row] * (1.f + sm90::exp2_mufu(sink_above_keys(row, sink)));
    });
  }

  /// ln(sum_j exp(s_j)); -inf for a row that saw no key.
  CUTLASS_DEVICE float lse(int row) const {
    return sum_[row] == 0.f ? kMinusInf : keys(row) * sm90::kLn2;
  }

  /// With the sink in the sum, which is all of it for a row that saw no key.
  CUTLASS_DEVICE float lse(int row, float sink) const {
    if (sum_[row] == 0.f) return sink;
    float const of_keys = exact_keys(row);
    float const without = of_keys * sm90::kLn2 + score_offset_[row];
    if (sink == kMinusInf) return without;
    float const above = (sink - score_offset_[row]) * sm90::kLog2e - of_keys;
    float const most = above > 0.f ? sink : without;
    return most + log2f(1.f + sm90::exp2_mufu(-fabsf(above))) * sm90::kLn2;
  }

 private:
  /// log2 of what the keys have in the denominator, but for the offset of their scores.
  CUTLASS_DEVICE float keys(int row) const { return origin_[row] - kShift + log2f(sum_[row]); }

  /// The same, exact if that was wanted.
  CUTLASS_DEVICE float exact_keys(int row) const {
    return exact_sum_[row] > 0.f ? origin_[row] - kShift + log2f(exact_sum_[row]) : keys(row);
  }

  template <class Scores>
  CUTLASS_DEVICE void add_to_exact_sum(Scores const& scores, float const (&scale)[kGroups]) {
    float const base = kInteger && !is_huge_ ? kMagic : 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < kColumns * kGroups; ++col) {
        float const score = scores(row, col) - base;
        exact_sum_[row] += sm90::exp2_mufu(score * scale[col / kColumns] - offset_[row]);
      }
    }
  }

  /// In powers of two, of a row that saw a key.
  CUTLASS_DEVICE float sink_above_keys(int row, float sink) const {
    return (sink - score_offset_[row]) * sm90::kLog2e - keys(row);
  }

  template <class Output, class Denominator>
  CUTLASS_DEVICE void divide(Output& out, Denominator const& denominator) {
    float inverse[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if constexpr (!Traits::kLinearExp) {
        sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 1);
        sum_[row] += __shfl_xor_sync(0xffffffff, sum_[row], 2);
      }
      if constexpr (kHasExactSum) {
        exact_sum_[row] += __shfl_xor_sync(0xffffffff, exact_sum_[row], 1);
        exact_sum_[row] += __shfl_xor_sync(0xffffffff, exact_sum_[row], 2);
      }
      inverse[row] = sum_[row] == 0.f ? 0.f : 1.f / denominator(row);
    }
    scale_rows(out, inverse);
  }

  static constexpr float kMinusInf = -INFINITY;
  static constexpr float kMagic = Traits::kMagic;
  // P is at most 2^(kShift + kSlack), below e4m3's 448. Small P are coarse, with a linear
  // exponential wrong: the more so the lower kShift.
  static constexpr float kShift = Traits::kLinearExp ? 7.f : 6.f;
  static constexpr float kSlack = Traits::kLinearExp ? 1.5f : 2.f;
  // e4m3's bias, and what makes the mean of the linear exponential's relative error 0.
  static constexpr float kLinearBias = 7.f - 0.0563f;
  // Where rounding of scores or offsets to 24 bits could make P too large.
  static constexpr float kHuge = 0x1p20f;
  // Offsets of int8 have kMagic times the factor in them, and so are rounded, another time for each
  // factor and origin: keys' P would differ by it. Up to here by 2^-6 powers of two at most.
  static constexpr float kLargestFactor = 0x1p-6f;

  /// kMagic times such a factor would cost the scores of int8 their precision.
  CUTLASS_DEVICE static bool has_huge_factor(float const (&scale)[kGroups]) {
    bool is_huge = false;
    CUTLASS_PRAGMA_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      is_huge |= kInteger && scale[group] > kLargestFactor;
    }
    return is_huge;
  }

  /// The largest score of a row in powers of two; of_group(first column) is that of a group.
  template <class OfGroup>
  CUTLASS_DEVICE static float maximum(float const (&scale)[kGroups], OfGroup const& of_group) {
    float most = kMinusInf;
    CUTLASS_PRAGMA_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      most = sm90::max_nan(most, __fmul_rn(of_group(group * kColumns), scale[group]));
    }
    return most;
  }

  /// Right unless all scores are negative and not of int8: then 0.
  template <class Scores>
  CUTLASS_DEVICE static float integer_maximum(Scores const& scores, int row,
                                              float const (&scale)[kGroups]) {
    return maximum(scale, [&](int first) {
      int most = __float_as_int(scores(row, first + kColumns - 1));
      CUTLASS_PRAGMA_UNROLL
      for (int col = first; col < first + kColumns - 1; col += 2) {
        most = __vimax3_s32(most, __float_as_int(scores(row, col)),
                            __float_as_int(scores(row, col + 1)));
      }
      return kInteger ? __int_as_float(most) - kMagic : __int_as_float(max(most, 0));
    });
  }

  template <class Scores>
  CUTLASS_DEVICE static float float_maximum(Scores const& scores, int row,
                                            float const (&scale)[kGroups]) {
    return maximum(scale, [&](int first) {
      float most = scores(row, first);
      CUTLASS_PRAGMA_UNROLL
      for (int col = first + 1; col < first + kColumns; ++col) {
        most = sm90::max_nan(most, scores(row, col));
      }
      return most;
    });
  }

  template <class Scores>
  CUTLASS_DEVICE void move_origins(float const (&block_max)[kRows], float const (&scale)[kGroups],
                                   Scores& scores) {
    bool is_huge = has_huge_factor(scale);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float origin = sm90::max_nan(origin_[row], block_max[row]);
      origin = sm90::max_nan(origin, __shfl_xor_sync(0xffffffff, origin, 1));
      origin = sm90::max_nan(origin, __shfl_xor_sync(0xffffffff, origin, 2));
      // -inf - -inf would be NaN: a row that has seen no key yet measures from 0 and gets P = 0.
      float const finite = origin == kMinusInf ? 0.f : origin;
      rescale_[row] = sm90::exp2_mufu(origin_[row] - finite);
      sum_[row] *= rescale_[row];
      if constexpr (kHasExactSum) exact_sum_[row] *= rescale_[row];
      origin_[row] = origin;
      offset_[row] = finite - kShift;
      is_huge |= fabsf(finite) > kHuge;
    }
    is_huge_ = is_huge;
    if (is_huge) subtract_origins(scale, scores);
  }

  /// Makes scores relative to the origins, which then count as 0. Those of int8 lose kMagic, too.
  template <class Scores>
  CUTLASS_DEVICE void subtract_origins(float const (&scale)[kGroups], Scores& scores) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      float const origin = origin_[row] == kMinusInf ? 0.f : origin_[row];
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < kColumns * kGroups; ++col) {
        float const factor = scale[col / kColumns];
        float const score = scores(row, col) - (kInteger ? kMagic : 0.f);
        scores(row, col) = __fdividef(__fsub_rn(__fmul_rn(score, factor), origin), factor);
      }
      offset_[row] = -kShift;
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
  float offset_[kRows];  // what exponents are measured from: origin - kShift
  float sum_[kRows];
  float rescale_[kRows];
  float score_offset_[kRows] = {};
  float exact_sum_[kRows] = {};  // of P before it is rounded, if wanted
  bool is_huge_ = false;         // the scores of this block were made relative to the origins
};

}  // namespace cute_kernels::attention
