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

/// tanh(factor * score) of scores that may be anywhere, in place.
template <class Scores>
CUTLASS_DEVICE void apply_tanh(Scores& scores, float factor) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) scores(i) = sm90::tanh_mufu(scores(i) * factor);
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

/// unit * tanh(factor * product) up to a tanh of 0.29, off by 1.7e-7 of the unit: a polynomial in
/// the squares of products that SquareBound shifts, whose coefficients have all factors in them.
struct TanhNearZero {
  static constexpr double kNear = 0.3;

  float origin;
  float coefficients[3];

  static TanhNearZero of(double factor, double unit, float origin) {
    constexpr double kCoefficients[] = {0.99999601038880, -0.33297479713407, 0.12522591053093};
    double const square = factor * factor;
    double const shift = origin * square;
    double const shifted[] = {
        kCoefficients[0] + shift * (kCoefficients[2] * shift - kCoefficients[1]),
        (kCoefficients[1] - 2 * kCoefficients[2] * shift) * square,
        kCoefficients[2] * square * square};
    TanhNearZero tanh{};
    tanh.origin = origin;
    for (int i = 0; i < 3; ++i) {
      tanh.coefficients[i] = static_cast<float>(unit * factor * shifted[i]);
    }
    return tanh;
  }
  bool is_normal() const {
    return std::isnormal(origin) &&
           std::all_of(coefficients, coefficients + 3, [](float x) { return std::isnormal(x); });
  }

  /// What a product is to be multiplied by.
  CUTLASS_DEVICE float over(float product) const {
    float const square = SquareBound::shifted(product, origin);
    float const sum = __fmaf_rn(square, coefficients[2], coefficients[1]);
    return __fmaf_rn(sum, square, coefficients[0]);
  }
};

/// Scores are tanh(factor * product), in units of the softcap. A row of the library's own.
struct Softcap {
  static constexpr bool kScores = true, kHides = false, kWeighs = false, kHasExponents = true;
  static constexpr int kGradients = 0;
  static constexpr bool kHasHooks = false;
  static constexpr bool kHasBlockMask = false;
  static constexpr float kHidden = -0x1p60f;  // whose square is finite
  struct Arguments {
    float factor;
    SquareBound near;       // of products, for what follows; of none where that overflows
    TanhNearZero tanh;      // in units of softcap
    TanhNearZero exponent;  // of P
  };

  static Arguments arguments_of(float scale, float softcap) {
    float const factor = softcap_factor(scale, softcap);
    double const nearest = TanhNearZero::kNear / factor;
    SquareBound const near = SquareBound::below(nearest * nearest);
    double const to_exponent = scale_of_scores(unit(softcap)) * sm90::kLog2e;
    auto const tanh = TanhNearZero::of(factor, 1., near.origin);
    auto const exponent = TanhNearZero::of(factor, to_exponent, near.origin);
    bool const normal = tanh.is_normal() && exponent.is_normal() && std::isnormal(near.end);
    return {factor, normal ? near : SquareBound{}, tanh, exponent};
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
    apply_tanh(scores, params.variant.factor);
  }

  template <class Params, class Scores>
  CUTLASS_DEVICE static bool gives_exponents(Params const& params, Scores const& scores) {
    return params.variant.near.contains(scores);
  }
  template <class Params>
  CUTLASS_DEVICE static auto exponent(Params const& params) {
    TanhNearZero near = params.variant.exponent;
    near.origin = params.variant.near.origin;  // the squares are there already
    return [near](float product, float offset) {
      return __fmaf_rn(product, near.over(product), -offset);
    };
  }

  template <class Params, class Scores>
  CUTLASS_DEVICE static void prepare(Params const& params, Scores& scores) {
    if (params.variant.near.contains(scores)) {
      // Of another origin to the compiler, which has no registers to keep the squares.
      TanhNearZero const& near = params.variant.tanh;
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
