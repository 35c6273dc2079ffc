#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/attention/variant/variant.hpp"
#include "cute_kernels/sm90/math.hpp"
#include "cute_kernels/sm90/tanh.hpp"

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

/// Scores become tanh(factor * score) in place: softcap * tanh(scale * score / softcap) in units of
/// softcap. Off by 3e-7. Of a whole warp.
template <class Scores>
CUTLASS_DEVICE void apply_softcap(Scores& scores, float factor) {
  using namespace cute;
  constexpr SquareBound kNear{2.f - 0.75f * 0.75f, 2.f};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) scores(i) *= factor;
  if (!kNear.contains(scores)) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) scores(i) = sm90::tanh_by_exponential(scores(i));
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

/// The polynomials of tanh(x) / x in x^2 that give tanh(x), for x up to kEnd, with the least
/// largest error: 1.7e-7, 1.8e-7 and 0.9e-7.
struct TanhNearZero {
  static constexpr double kEnd = 0.3;
  static constexpr double kCoefficients[] = {0.99999601038880, -0.33297479713407, 0.12522591053093};
};
struct TanhFurther {
  static constexpr double kEnd = 0.52;
  static constexpr double kCoefficients[] = {0.99999688277747, -0.33317581336404, 0.13116635752665,
                                             -0.04263884530330};
};

struct TanhFar {
  static constexpr double kEnd = 0.7;
  static constexpr double kCoefficients[] = {0.99999849546365, -0.33326973091226, 0.13257454864960,
                                             -0.05019525755330, 0.01319418664807};
};

/// unit * tanh(factor * product): one of these in the squares of products that SquareBound shifts,
/// with coefficients that have all factors in them.
template <class Polynomial>
struct TanhOfProduct {
  static constexpr int kTerms = sizeof(Polynomial::kCoefficients) / sizeof(double);

  float origin;
  float coefficients[kTerms];

  static TanhOfProduct of(double factor, double unit, float origin) {
    double const square = factor * factor, shift = origin * square;
    double shifted[kTerms];
    std::copy_n(Polynomial::kCoefficients, kTerms, shifted);
    for (int first = 0; first < kTerms - 1; ++first) {  // of x^2 = y - shift, by Horner's rule
      for (int i = kTerms - 2; i >= first; --i) shifted[i] -= shift * shifted[i + 1];
    }
    TanhOfProduct tanh{};
    tanh.origin = origin;
    double power = unit * factor;
    for (int i = 0; i < kTerms; ++i, power *= square) {
      tanh.coefficients[i] = static_cast<float>(shifted[i] * power);
    }
    return tanh;
  }
  bool is_normal() const {
    return std::isnormal(origin) && std::all_of(coefficients, coefficients + kTerms,
                                                [](float x) { return std::isnormal(x); });
  }

  /// What a product is to be multiplied by.
  CUTLASS_DEVICE float over(float product) const {
    float const square = SquareBound::shifted(product, origin);
    float sum = coefficients[kTerms - 1];
    CUTLASS_PRAGMA_UNROLL
    for (int i = kTerms - 2; i >= 0; --i) sum = __fmaf_rn(sum, square, coefficients[i]);
    return sum;
  }
};

/// The products that such a polynomial is for; none where that overflows.
template <class Polynomial>
SquareBound products_of(double factor) {
  double const last = Polynomial::kEnd / factor;
  return SquareBound::below(last * last);
}

/// Scores are tanh(factor * product), in units of the softcap. A row of the library's own.
struct Softcap {
  static constexpr bool kScores = true, kHides = false, kWeighs = false, kHasExponents = true;
  static constexpr int kGradients = 0;
  static constexpr bool kHasHooks = false;
  static constexpr bool kHasBlockMask = false;
  static constexpr float kHidden = -0x1p60f;  // whose square is finite
  /// P of products up to a polynomial's end.
  template <class Polynomial>
  struct Exponent {
    SquareBound products;  // or of none
    TanhOfProduct<Polynomial> tanh;

    static Exponent of(double factor, double unit) {
      auto const products = products_of<Polynomial>(factor);
      auto const tanh = TanhOfProduct<Polynomial>::of(factor, unit, products.origin);
      bool const normal = tanh.is_normal() && std::isnormal(products.end);
      return {normal ? products : SquareBound{}, tanh};
    }
  };
  struct Arguments {
    float factor;
    TanhOfProduct<TanhNearZero> tanh;  // in units of softcap, where `near` is
    Exponent<TanhNearZero> near;
    Exponent<TanhFurther> further;
    Exponent<TanhFar> far;
  };

  static Arguments arguments_of(float scale, float softcap) {
    float const factor = softcap_factor(scale, softcap);
    double const unit_log2 = scale_of_scores(unit(softcap)) * sm90::kLog2e;
    auto near = Exponent<TanhNearZero>::of(factor, unit_log2);
    auto const tanh = TanhOfProduct<TanhNearZero>::of(factor, 1., near.tanh.origin);
    if (!tanh.is_normal()) near.products = {};
    return {factor, tanh, near, Exponent<TanhFurther>::of(factor, unit_log2),
            Exponent<TanhFar>::of(factor, unit_log2)};
  }
  template <class Problem>
  static Arguments arguments_of(Problem const& problem) {
    return arguments_of(problem.call.scale, problem.call.softcap);
  }
  /// Scores between -2^-40 and 2^-40 may be anywhere there, and a hidden one is far below.
  static float unit(float softcap) {
    return std::min(std::max(softcap, 0x1p-40f), kLargestSoftcap);
  }
  static float unit(AttentionCall const& call) { return unit(call.softcap); }

  template <class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change(Params const& params, Scores& scores, PlaceOf const&) {
    apply_softcap(scores, params.variant.factor);
  }
  template <class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change_again(Params const& params, Scores& scores, PlaceOf const&) {
    // Small ones, too, to a part of themselves: a softcap may be large.
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      scores(i) = sm90::tanh_mufu(scores(i) * params.variant.factor);
    }
  }

  template <class Params, class Scores>
  CUTLASS_DEVICE static Exponents gives_exponents(Params const& params, Scores const& scores,
                                                  bool& is_near) {
    if (is_near && params.variant.near.products.contains(scores)) return Exponents::kNear;
    is_near = false;
    if (params.variant.further.products.contains(scores)) return Exponents::kFurther;
    return params.variant.far.products.contains(scores) ? Exponents::kFar : Exponents::kNone;
  }
  template <class Params, class Exponentiate>
  CUTLASS_DEVICE static void exponents(Params const& params, Exponents which,
                                       Exponentiate const& exponentiate) {
    auto by = [&](auto const& exponent) {
      auto tanh = exponent.tanh;
      tanh.origin = exponent.products.origin;  // the squares are there already
      exponentiate([tanh](float product, float offset) {
        return __fmaf_rn(product, tanh.over(product), -offset);
      });
    };
    if (which == Exponents::kNear) {
      by(params.variant.near);
    } else if (which == Exponents::kFurther) {
      by(params.variant.further);
    } else {
      by(params.variant.far);
    }
  }

  template <class Params, class Scores>
  CUTLASS_DEVICE static void prepare(Params const& params, Scores& scores) {
    if (params.variant.near.products.contains(scores)) {
      // Of another origin to the compiler, which has no registers to keep the squares.
      auto const& near = params.variant.tanh;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < cute::size(scores); ++i) scores(i) *= near.over(scores(i));
    } else {
      apply_softcap(scores, params.variant.factor);
    }
  }
  /// Of tanh, or kHidden: dS has the factor 1 - tanh^2.
  template <class Params>
  CUTLASS_DEVICE static ChangedScore<0> element(Params const&, float tanh, bool hidden,
                                                NoPlaces const&) {
    return {tanh, hidden, __fmaf_rn(-tanh, tanh, 1.f), 1.f, {}};
  }
};

}  // namespace cute_kernels::attention
