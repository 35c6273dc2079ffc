#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/statistics.hpp"
#include "cute_kernels/attention/softcap.hpp"
#include "cute_kernels/sm90/math.hpp"

// The elementwise part of a step whose scores have a softcap, on transposed accumulators: a thread
// has pairs of adjacent queries, 8 apart. With S = softcap tanh(x), dS/dx has the factor
// 1 - tanh^2, which P takes to dS.
namespace cute_kernels::attention {

/// A softcap's scores, tanh, from the largest there are to what hides a key (HiddenStep).
struct CappedScore {
  static constexpr float kLargest = INFINITY;
  static constexpr float kHidden = -INFINITY;
};

/// Of tanh, -inf where hidden, P = 2^(scale_log2 * tanh - lse_log2) and P (1 - tanh^2), both
/// rounded at once: there are no registers for both in fp32. `statistics` are the block's, the
/// thread's first query is `column`. Careful, P is never above 1, as rounding of a large lse would
/// have it.
template <bool kCareful, class Rows, class Statistics, class Probabilities>
CUTLASS_DEVICE void capped_probabilities(Rows const& rows, Statistics const& statistics, int column,
                                         float scale_log2, Probabilities& p,
                                         Probabilities& p_of_ds) {
  using namespace cute;
  using Element = typename Probabilities::value_type;
  auto round = [&](Probabilities& to, int row, int col, float first, float second) {
    auto pairs = make_tensor(to.data(), rows.layout());
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    reinterpret_cast<cutlass::Array<Element, 2>&>(pairs(row, col)) = convert({first, second});
  };
  auto probability = [&](float tanh, float minus_lse) {
    float exponent = __fmaf_rn(tanh, scale_log2, minus_lse);
    if constexpr (kCareful) {
      if (tanh == CappedScore::kHidden) return 0.f;  // also where lse is NaN
      exponent = sm90::min_nan(exponent, 0.f);
    }
    return sm90::exp2_mufu(exponent);
  };
  auto slope = [](float tanh) {
    float const finite = sm90::max_nan(tanh, -1.f);
    return __fmaf_rn(-finite, finite, 1.f);
  };
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < size<1>(rows); col += 2) {
    int const query = column + 4 * col;
    float const minus_lse[] = {statistics.minus_lse(query), statistics.minus_lse(query + 1)};
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(rows); ++row) {
      float const tanh[] = {rows(row, col), rows(row, col + 1)};
      float const first = probability(tanh[0], minus_lse[0]);
      float const second = probability(tanh[1], minus_lse[1]);
      round(p, row, col, first, second);
      round(p_of_ds, row, col, first * slope(tanh[0]), second * slope(tanh[1]));
    }
  }
}

}  // namespace cute_kernels::attention
