#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/hidden.hpp"
#include "cute_kernels/attention/backward/statistics.hpp"
#include "cute_kernels/attention/variant/variant.hpp"
#include "cute_kernels/sm90/math.hpp"

// The elementwise part of a step whose scores a variant changes, on transposed accumulators: a
// thread has pairs of adjacent queries, 8 apart. With S = f(x), dS/dx is a factor that takes P to
// dS; a weight w of P is one of dP alone: dS = P (w dP - delta).
namespace cute_kernels::attention {

/// A product Q K^T, or what prepare() makes of it, from the largest there is to what hides a key
/// (HiddenStep).
template <class Variant>
struct RawScore {
  static constexpr float kLargest = INFINITY;
  static constexpr float kTooLarge = INFINITY;
  static constexpr float kHidden = Variant::kHidden;
};

/// What is left of a block's scores, rounded at once: there are no registers for it in fp32.
template <class Element, class Layout, class Variant>
struct ChangedProbabilities {
  using Fragment = decltype(cute::make_tensor<Element>(Layout{}));
  static constexpr int kGradients = Variant::kGradients;

  Fragment p;                                              // times the weight: what dV takes
  Fragment of_changed_score;                               // and times the slope
  Fragment of_delta;                                       // what delta is, with weights
  Fragment of_captured[kGradients == 0 ? 1 : kGradients];  // dP - delta, for captured tensors

  /// What dP is multiplied by.
  CUTLASS_DEVICE Fragment const& of_dp() const {
    if constexpr (Variant::kScores) return of_changed_score;
    return p;
  }
};

/// P = 2^(scale_log2 * score - lse_log2) of every score of a block, of raw ones or what prepare()
/// made of them, kHidden where hidden, which without kHidesSome none is. place(row, column) is
/// where one stands; `statistics` are the block's, the thread's first query is `column`. Careful, P
/// is hardly above 1, as rounding of a large lse would have it.
template <bool kCareful, bool kHidesSome, class Variant, class Params, class Rows, class Place,
          class Statistics, class Probabilities>
CUTLASS_DEVICE void changed_probabilities(Params const& params, Rows const& rows,
                                          Place const& place, Statistics const& statistics,
                                          int column, Probabilities& to) {
  using namespace cute;
  using Fragment = typename Probabilities::Fragment;
  using Element = typename Fragment::value_type;
  auto round = [&](Fragment& fragment, int row, int col, float first, float second) {
    auto pairs = make_tensor(fragment.data(), rows.layout());
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    reinterpret_cast<cutlass::Array<Element, 2>&>(pairs(row, col)) = convert({first, second});
  };
  auto probability = [&](auto const& changed, float minus_lse) {
    float exponent = __fmaf_rn(changed.value, params.scale_log2, minus_lse);
    // Hidden by a hook, or careful also where lse is NaN.
    if ((Variant::kHasHooks || kCareful) && changed.hidden) return 0.f;
    if constexpr (kCareful) exponent = not_too_large<Exponent>(exponent);
    return sm90::exp2_mufu(exponent);
  };
  auto element = [&](int row, int col) {
    float const score = rows(row, col);
    return Variant::element(params, score, kHidesSome && score == Variant::kHidden,
                            place(row, col));
  };
  // Without hooks all is finite, and hidden P are 0 by themselves.
  auto times = [](auto const& changed, float p, float factor) {
    return Variant::kHasHooks ? changed.times(p, factor) : p * factor;
  };
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < size<1>(rows); col += 2) {
    int const query = column + 4 * col;
    float const minus_lse[] = {statistics.minus_lse(query), statistics.minus_lse(query + 1)};
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(rows); ++row) {
      auto const a = element(row, col);
      auto const b = element(row, col + 1);
      float const p[] = {probability(a, minus_lse[0]), probability(b, minus_lse[1])};
      float const weighed[] = {times(a, p[0], a.weight), times(b, p[1], b.weight)};
      round(to.p, row, col, weighed[0], weighed[1]);
      if constexpr (Variant::kScores) {
        round(to.of_changed_score, row, col, times(a, weighed[0], a.slope),
              times(b, weighed[1], b.slope));
      }
      if constexpr (Variant::kWeighs) {
        round(to.of_delta, row, col, times(a, p[0], a.slope), times(b, p[1], b.slope));
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Variant::kGradients; ++i) {
        round(to.of_captured[i], row, col, times(a, p[0], a.slopes[i]),
              times(b, p[1], b.slopes[i]));
      }
    }
  }
}

/// changed_probabilities() of a block in which something is hidden or not: with hooks most steps
/// spare asking. Careful, they do not.
template <bool kCareful, class Variant, class... Arguments>
CUTLASS_DEVICE void changed_probabilities_of(bool hides_some, Arguments&&... arguments) {
  if (Variant::kHasHooks && !kCareful && !hides_some) {
    return changed_probabilities<kCareful, false, Variant>(arguments...);
  }
  changed_probabilities<kCareful, true, Variant>(arguments...);
}

/// dP^T - delta, with weights dP^T, becomes dS^T in place. Careful, a delta that is not finite does
/// nothing where P is 0.
template <bool kCareful, class Variant, class Gradients, class Statistics, class Probabilities>
CUTLASS_DEVICE void gradients_of_changed(Gradients& gradients, Statistics const& statistics,
                                         int column, Probabilities const& p) {
  using namespace cute;
  auto of_dp = make_tensor(p.of_dp().data(), gradients.layout());
  auto of_delta = make_tensor(p.of_delta.data(), gradients.layout());
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < size<1>(gradients); ++col) {
    float minus_delta = 0.f;
    if constexpr (Variant::kWeighs) {
      minus_delta = statistics.minus_delta(column + col / 2 * 8 + col % 2);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(gradients); ++row) {
      float& gradient = gradients(row, col);
      gradient *= static_cast<float>(of_dp(row, col));
      if constexpr (Variant::kWeighs) {
        float const factor = static_cast<float>(of_delta(row, col));
        if (!kCareful || factor != 0.f) gradient += factor * minus_delta;
      }
    }
  }
}

}  // namespace cute_kernels::attention
