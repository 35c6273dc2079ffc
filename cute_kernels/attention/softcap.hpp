#pragma once

#include <algorithm>

#include <cute/tensor.hpp>

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

}  // namespace cute_kernels::attention
