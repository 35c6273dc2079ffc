#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/attention/variant/variant.hpp"
#include "cute_kernels/sm90/math.hpp"

// tanh takes two results of the special function unit where softmax takes one. tanh.approx, which
// takes one, is off by 5e-4, or 0.025 of a softcap of 50. So where all of a warp's scores are near
// 0, which is most often, tanh is a polynomial on the FMA pipes, odd, of the least degree whose
// largest error is below 2e-7 there.
namespace cute_kernels::attention {

/// Whether squares are less than a bound, asked of many numbers at once: origin + x^2 has the
/// exponent of `origin` as long as it is less than `end`, and what OR makes of several shows if one
/// has another. `end` is a power of two and at most twice `origin`.
struct SquareBound {
  float origin;
  float end;

  /// Squares less than the two's difference.
  static SquareBound below(double bound) {
    int exponent;
    std::frexp(2 * bound, &exponent);
    double const end = std::ldexp(1., exponent);
    return {static_cast<float>(end - bound), static_cast<float>(end)};
  }

  CUTLASS_DEVICE static float shifted(float x, float origin) { return __fmaf_rn(x, x, origin); }

  /// Of a whole warp. False if one is NaN.
  template <class Numbers>
  CUTLASS_DEVICE bool contains(Numbers const& numbers) const {
    uint32_t bits[2] = {0, 0};  // three operands an instruction, and two chains of them
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(numbers); ++i) {
      bits[i / 2 % 2] |= __float_as_uint(shifted(numbers(i), origin));
    }
    return !__any_sync(0xffffffff, (bits[0] | bits[1]) >= __float_as_uint(end));
  }
};

/// What products of Q and K are multiplied by before tanh: scale / softcap, of which no product
/// with 0 is NaN.
inline float softcap_factor(float scale, float softcap) {
  return static_cast<float>(std::min(double{scale} / double{softcap}, 0x1p120));
}

/// tanh(factor * score) of scores that may be anywhere, in place.
template <class Scores>
CUTLASS_DEVICE void apply_tanh(Scores& scores, float factor) {
  float const to_power = 2.f * sm90::kLog2e * factor;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) {
    float const power = sm90::exp2_mufu(scores(i) * to_power);
    scores(i) = __fmaf_rn(-2.f, sm90::reciprocal_mufu(1.f + power), 1.f);
  }
}

/// Scores become tanh(factor * score) in place: softcap * tanh(scale * score / softcap) in units of
/// softcap. Off by 3e-7. Of a whole warp.
template <class Scores>
CUTLASS_DEVICE void apply_softcap(Scores& scores, float factor) {
  using namespace cute;
  constexpr SquareBound kNear{2.f - 0.75f * 0.75f, 2.f};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) scores(i) *= factor;
  if (!kNear.contains(scores)) {
    apply_tanh(scores, 1.f);
    return;
  }
  constexpr float kCoefficients[] = {0.999997228f, -0.333230764f, 0.132260914f, -0.0492804412f,
                                     0.0123188268f};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) {
    float const x = scores(i);
    float const square = x * x;
    float sum = kCoefficients[4];
    CUTLASS_PRAGMA_UNROLL
    for (int k = 3; k >= 0; --k) sum = __fmaf_rn(sum, square, kCoefficients[k]);
    scores(i) = x * sum;
  }
}

/// Exponents of P straight from products of Q and K, log2(e) * softcap * tanh(factor * product), of
/// products that a bound contains: tanh's polynomial up to 0.3, off by 1.7e-7, in the squares that
/// SquareBound shifts, with all factors in its coefficients.
struct SoftcapExponents {
  SquareBound bound;
  float coefficients[3];

  /// Where one of the coefficients is no normal number, of no product.
  static SoftcapExponents of(float scale, float softcap) {
    constexpr double kNear = 0.3;
    constexpr double kCoefficients[] = {0.99999601038880, -0.33297479713407, 0.12522591053093};
    double const factor = softcap_factor(scale, softcap);
    double const square = factor * factor;
    SoftcapExponents exponents{};
    exponents.bound = SquareBound::below(kNear * kNear / square);
    double const origin = exponents.bound.origin * square;
    double const unit = double{scale_of_scores(softcap) * sm90::kLog2e} * factor;
    double const shifted[] = {
        kCoefficients[0] + origin * (kCoefficients[2] * origin - kCoefficients[1]),
        (kCoefficients[1] - 2 * kCoefficients[2] * origin) * square,
        kCoefficients[2] * square * square};
    bool normal = std::isnormal(exponents.bound.origin) && std::isnormal(exponents.bound.end);
    for (int i = 0; i < 3; ++i) {
      exponents.coefficients[i] = static_cast<float>(unit * shifted[i]);
      normal &= std::isnormal(exponents.coefficients[i]);
    }
    return normal ? exponents : SoftcapExponents{};
  }

  CUTLASS_DEVICE float operator()(float product, float offset) const {
    float const square = SquareBound::shifted(product, bound.origin);
    float const sum =
        __fmaf_rn(__fmaf_rn(square, coefficients[2], coefficients[1]), square, coefficients[0]);
    return __fmaf_rn(product, sum, -offset);
  }
};

/// Scores are tanh(factor * product), in units of the softcap. A row of the library's own.
struct Softcap {
  static constexpr bool kScores = true, kHides = false, kWeighs = false, kHasExponents = true;
  static constexpr int kGradients = 0;
  static constexpr bool kHasHooks = false;
  static constexpr bool kHasBlockMask = false;
  struct Arguments {
    float factor;
    SoftcapExponents exponents;
  };

  static Arguments arguments_of(float scale, float softcap) {
    return {softcap_factor(scale, softcap), SoftcapExponents::of(scale, softcap)};
  }
  template <class Problem>
  static Arguments arguments_of(Problem const& problem) {
    return arguments_of(problem.call.scale, problem.call.softcap);
  }
  static float unit(AttentionCall const& call) { return call.softcap; }

  template <class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change(Params const& params, Scores& scores, PlaceOf const&) {
    apply_softcap(scores, params.variant.factor);
  }
  template <class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change_again(Params const& params, Scores& scores, PlaceOf const&) {
    apply_tanh(scores, params.variant.factor);
  }

  template <class Params, class Scores>
  CUTLASS_DEVICE static bool gives_exponents(Params const& params, Scores const& scores) {
    return params.variant.exponents.bound.contains(scores);
  }
  template <class Params>
  CUTLASS_DEVICE static SoftcapExponents const& exponent(Params const& params) {
    return params.variant.exponents;
  }

  template <class Params, class Scores>
  CUTLASS_DEVICE static void prepare(Params const& params, Scores& scores) {
    apply_softcap(scores, params.variant.factor);
  }
  /// Of tanh, or -inf where hidden: dS has the factor 1 - tanh^2.
  template <class Params>
  CUTLASS_DEVICE static ChangedScore<0> element(Params const&, float tanh, NoPlaces const&) {
    float const finite = sm90::max_nan(tanh, -1.f);
    return {tanh, tanh == -INFINITY, __fmaf_rn(-finite, finite, 1.f), 1.f, {}};
  }
};

}  // namespace cute_kernels::attention
