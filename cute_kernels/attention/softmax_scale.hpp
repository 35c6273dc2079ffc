#pragma once

#include <algorithm>

namespace cute_kernels::attention {

/// What scores are multiplied by. A softmax scale below 2^-100 does as well as that: all scores are
/// 0 but for inputs beyond 2^40, while 0, which a denormal scale counts as, times a hidden score of
/// -inf would be NaN. Times log2(e), it is finite.
inline float scale_of_scores(float softmax_scale) {
  return std::min(std::max(softmax_scale, 0x1p-100f), 0x1p127f);
}

/// What products of Q and K are multiplied by before tanh: scale / softcap, of which no product
/// with 0 is NaN.
inline float softcap_factor(float scale, float softcap) {
  return static_cast<float>(std::min(double{scale} / double{softcap}, 0x1p120));
}

}  // namespace cute_kernels::attention
