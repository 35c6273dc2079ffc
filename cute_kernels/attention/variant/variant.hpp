#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/variant/arguments.hpp"
#include "cute_kernels/attention/variant/dual.hpp"
#include "cute_kernels/attention/variant/place.hpp"

// What a kernel changes of attention, which its Traits name as Variant. It has
// - kScores: it changes the scores; kHides: it hides keys; kWeighs: it multiplies P behind the row
//   sums; kGradients: of how many captured tensors backward computes gradients; kHasBlockMask:
//   only listed blocks are computed, and full ones hide nothing; kHasExponents: it has
//   gives_exponents();
// - Arguments, which the kernel's parameters end with, and arguments_of(problem);
// - unit(call): what the scores are in units of, after change();
// - change(params, scores, place): of a block, in place, forward. place(row, column) is where an
//   element stands. change_again() the same, where the scores are anything.
// - gives_exponents(params, scores): whether P of a block of a warp can do without change(). Then
//   exponent(params)(score, offset) is what change(), scale and offset make of a score.
// - prepare(params, scores): of a block, in place, backward; then of each of its scores, or of
//   kHidden instead of it, element(params, score, place).
namespace cute_kernels::attention {

/// The attention that everybody means.
struct NoVariant {
  static constexpr bool kScores = false, kHides = false, kWeighs = false, kHasExponents = false;
  static constexpr int kGradients = 0;
  static constexpr bool kHasHooks = false;
  static constexpr bool kHasBlockMask = false;
  static constexpr float kHidden = -INFINITY;
  struct Arguments {};

  template <class Problem>
  static Arguments arguments_of(Problem const&) {
    return {};
  }
  static float unit(AttentionCall const& call) { return call.scale; }
};

/// What backward needs to know of a score. `hidden`: P is 0, whatever else stands here, which need
/// not be finite.
template <int kGradients>
struct ChangedScore {
  float value;
  bool hidden;
  float slope;                                     // with respect to the product Q K^T, scaled
  float weight;                                    // of P
  float slopes[kGradients == 0 ? 1 : kGradients];  // with respect to captured tensors

  /// p * factor, one of the above. Of a factor that is 1 to the compiler it is p itself.
  CUTLASS_DEVICE float times(float p, float factor) const { return hidden ? 0.f : p * factor; }
};

/// A user's. `Hooks` has kScore, kMask and kWeight, which say whether there are score(), mask() and
/// weight(), kIndexesQueries and kIndexesKeys for SequencePlace, kGradients, and kHasBlockMask.
template <class Hooks_>
struct HookedVariant {
  using Hooks = Hooks_;
  static constexpr bool kScores = Hooks::kScore, kHides = Hooks::kMask, kWeighs = Hooks::kWeight;
  static constexpr int kGradients = Hooks::kGradients;
  // Constants, of which code for the device is made: it has no such array.
  template <int i>
  static constexpr Gradient kKind = Hooks::kKinds[i];
  static constexpr bool kHasHooks = true;
  static constexpr bool kHasExponents = false;
  static constexpr bool kHasBlockMask = Hooks::kHasBlockMask;
  static constexpr float kHidden = -INFINITY;
  using Arguments = VariantArguments;

  /// The same of a full block.
  struct UnmaskedHooks : Hooks {
    static constexpr bool kMask = false;
  };
  using Unmasked = HookedVariant<UnmaskedHooks>;

  template <class Problem>
  static Arguments arguments_of(Problem const& problem) {
    return *problem.variant;
  }
  static float unit(AttentionCall const& call) { return kScores ? 1.f : call.scale; }

  template <class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change(Params const& params, Scores& scores, PlaceOf const& place) {
    change_each<kScores, kHides>(params, scores, place);
  }

  /// The same with a block mask, of a block that is full or not.
  template <class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change_listed(Params const& params, Scores& scores,
                                           PlaceOf const& place, bool is_full) {
    change_each<kScores, false>(params, scores, place);
    if (kHides && !is_full) change_each<false, kHides>(params, scores, place);
  }

  template <class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change_again(Params const& params, Scores& scores,
                                          PlaceOf const& place) {
    change(params, scores, place);
  }

  /// P becomes weight * P, and stays 0 where it is, whatever the weight.
  template <class Params, class Probabilities, class PlaceOf>
  CUTLASS_DEVICE static void weigh(Params const& params, Probabilities& p, PlaceOf const& place) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < cute::size<0>(p); ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < cute::size<1>(p); ++col) {
        float const weight = Hooks::weight(place(row, col), params.variant);
        p(row, col) = p(row, col) == 0.f ? 0.f : p(row, col) * weight;
      }
    }
  }

  template <class Params, class Scores>
  CUTLASS_DEVICE static void prepare(Params const&, Scores&) {}

  /// A score of -inf is hidden already: hooks are asked about 0 instead.
  template <class Params>
  CUTLASS_DEVICE static ChangedScore<kGradients> element(Params const& params, float score,
                                                         Place const& here) {
    ChangedScore<kGradients> changed{score, score == -INFINITY, 1.f, 1.f, {}};
    if constexpr (kHides) changed.hidden |= !Hooks::mask(here, params.variant);
    if constexpr (kScores) {
      using Number = Dual<1 + kGradients>;
      float const scaled = changed.hidden ? 0.f : score * params.variant.scale;
      if constexpr (Hooks::kScoreGradient) {
        changed.value = Hooks::score(scaled, here, params.variant);
        changed.slope = Hooks::score_gradient(scaled, here, params.variant);
      } else {
        Number const number =
            Hooks::template score<Number>(Number::variable(scaled, 0), here, params.variant);
        changed.value = number.value;
        changed.slope = number.slopes[0];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kGradients; ++i) changed.slopes[i] = number.slopes[1 + i];
      }
    }
    if constexpr (kWeighs) changed.weight = Hooks::weight(here, params.variant);
    return changed;
  }

 private:
  template <bool kChangesScore, bool kHidesKey, class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change_each(Params const& params, Scores& scores,
                                         PlaceOf const& place) {
    if constexpr (kChangesScore || kHidesKey) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < cute::size<0>(scores); ++row) {
        CUTLASS_PRAGMA_UNROLL
        for (int col = 0; col < cute::size<1>(scores); ++col) {
          Place const here = place(row, col);
          float& score = scores(row, col);
          if constexpr (kChangesScore) {
            score = Hooks::score(score * params.variant.scale, here, params.variant);
          }
          if constexpr (kHidesKey) {
            if (!Hooks::mask(here, params.variant)) score = -INFINITY;
          }
        }
      }
    }
  }
};

}  // namespace cute_kernels::attention
