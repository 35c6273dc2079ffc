#pragma once

#include <algorithm>

namespace cute_kernels::attention {

/// What scores are multiplied by. A softmax scale below 2^-100 does as well as that: all scores are
/// 0 but for inputs beyond 2^40, while 0, which a denormal scale counts as, times a hidden score of
/// -inf would be NaN. Times log2(e), it is finite.
inline float scale_of_scores(float softmax_scale) {
  return std::min(std::max(softmax_scale, 0x1p-100f), 0x1p127f);
}

/// The same in 8 bits, where a scale beyond 2^64 does as well as that: the largest score has all
/// the weight, and scores stay finite.
inline float scale_of_fp8_scores(float softmax_scale) { return std::min(softmax_scale, 0x1p64f); }

/// A softcap beyond it does as well as that: it changes no score, and a score over it is a normal
/// number.
inline constexpr float kLargestSoftcap = 0x1p100f;

/// What products of Q and K are multiplied by before tanh: scale / softcap, of which no product
/// with 0 is NaN.
inline float softcap_factor(float scale, float softcap) {
  double const divisor = std::min(softcap, kLargestSoftcap);
  return static_cast<float>(std::min(scale / divisor, 0x1p120));
}

}  // namespace cute_kernels::attention
