#pragma once

#include <algorithm>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/variant/variant.hpp"
#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {

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
    scores(i) = 1.f - 2.f * sm90::reciprocal_mufu(1.f + power);
  }
}

/// Scores become tanh(factor * score) in place: softcap * tanh(scale * score / softcap) in units of
/// softcap. Off by 3e-7. Of a whole warp.
///
/// Where none of the warp's is far from 0, which is most often, a polynomial: what the special
/// function unit has to do for an exact tanh takes as long as two exponentials, and softmax needs
/// one more. tanh.approx, which takes as long as one, is off by 5e-4, or 0.025 of a softcap of 50.
template <class Scores>
CUTLASS_DEVICE void apply_softcap(Scores& scores, float factor) {
  using namespace cute;
  constexpr float kNear = 0.75f;
  float farthest = 0.f;  // NaN passes: it is NaN in either way
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) farthest = fmaxf(farthest, fabsf(scores(i)));
  if (__any_sync(0xffffffff, farthest * factor > kNear)) {
    apply_tanh(scores, factor);
    return;
  }
  // The odd polynomial of degree 9 whose largest error up to kNear is the least, 1.9e-7.
  constexpr float kCoefficients[] = {0.999997228f, -0.333230764f, 0.132260914f, -0.0492804412f,
                                     0.0123188268f};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) {
    float const x = scores(i) * factor;
    float const square = x * x;
    float sum = kCoefficients[4];
    CUTLASS_PRAGMA_UNROLL
    for (int k = 3; k >= 0; --k) sum = __fmaf_rn(sum, square, kCoefficients[k]);
    scores(i) = x * sum;
  }
}

/// Scores are tanh(factor * product), in units of the softcap. A row of the library's own.
struct Softcap {
  static constexpr bool kScores = true, kHides = false, kWeighs = false;
  static constexpr int kGradients = 0;
  static constexpr bool kHasHooks = false;
  static constexpr bool kHasBlockMask = false;
  struct Arguments {
    float factor;
  };

  template <class Problem>
  static Arguments arguments_of(Problem const& problem) {
    Arguments arguments{};  // nvcc's host code has no braces around one member
    arguments.factor = softcap_factor(problem.call.scale, problem.call.softcap);
    return arguments;
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
