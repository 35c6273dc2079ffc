#pragma once

#include <cstdint>

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
//   element stands. change_again() the same, where the scores are anything. What hides keys is
//   asked before, by shown_elements().
// - gives_exponents(params, scores, is_near): whether P of a block of a warp can do without
//   change(), and how. Then exponents(params, how, use) gives use() a function of score and offset:
//   what change(), scale and offset make of them. `is_near` is true before a tile's first block,
//   and kept from block to block.
// - prepare(params, scores): of a block, in place, backward; then of each of its scores, or of
//   kHidden instead of it, element(params, score, hidden, place).
namespace cute_kernels::attention {

/// Which elements of a block a mask hook shows, a bit for each. It is asked before the scores are
/// there, so that the answers' instructions and loads hide under the products; there are not enough
/// predicates to keep them.
template <int kRows, int kColumns>
class ShownElements {
 public:
  /// shows(row, column), which is not asked of a full block, nor where known(words) says that it
  /// has filled in the bits.
  template <class Shows, class Known>
  CUTLASS_DEVICE ShownElements(bool is_full, Shows const& shows, Known const& known)
      : is_full_(is_full), words_{} {
    if (is_full) return;
    is_known_ = known(words_);
    if (is_known_) return;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < kColumns; ++col) {
        int const i = row * kColumns + col;
        if (shows(row, col)) words_[i / 32] |= uint32_t{1} << i % 32;
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (uint32_t& word : words_) asm volatile("" : "+r"(word));  // not asked again later
  }

  /// Whether the bits were filled in, which then know the call's own mask, too.
  CUTLASS_DEVICE bool is_known() const { return is_known_; }

  template <class Scores>
  CUTLASS_DEVICE void hide_others(Scores& scores, float hidden) const {
    if (is_full_) return;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < kColumns; ++col) {
        int const i = row * kColumns + col;
        if ((words_[i / 32] & uint32_t{1} << i % 32) == 0) scores(row, col) = hidden;
      }
    }
  }

 private:
  bool is_full_;
  bool is_known_ = false;
  uint32_t words_[(kRows * kColumns + 31) / 32];
};

/// All, where no hook hides any.
struct AllShown {
  static constexpr bool is_known() { return false; }

  template <class Scores>
  CUTLASS_DEVICE void hide_others(Scores&, float) const {}
};

/// Of what nothing is known before hooks are asked.
struct NothingKnown {
  template <class Words>
  CUTLASS_DEVICE bool operator()(Words&) const {
    return false;
  }
};

/// Of a block of (row, column) scores, which need not be there yet. places() is a function that
/// tells where an element stands.
template <class Variant, class Params, class Scores, class Places, class Known = NothingKnown>
CUTLASS_DEVICE auto shown_elements(Params const& params, Scores const& scores, Places const& places,
                                   bool is_full, Known const& known = {}) {
  if constexpr (Variant::kHides) {
    using cute::size;
    auto const place = places();
    return ShownElements<decltype(size<0>(scores))::value, decltype(size<1>(scores))::value>(
        is_full,
        [&](int row, int col) { return Variant::Hooks::mask(place(row, col), params.variant); },
        known);
  } else {
    return AllShown{};
  }
}

/// How P comes straight from a block's scores, without change(): see gives_exponents() above.
enum class Exponents { kNone, kNear, kFurther, kFar };

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

  template <class Problem>
  static Arguments arguments_of(Problem const& problem) {
    return *problem.variant;
  }
  static float unit(AttentionCall const& call) { return kScores ? 1.f : call.scale; }

  template <class Params, class Scores, class PlaceOf>
  CUTLASS_DEVICE static void change(Params const& params, Scores& scores, PlaceOf const& place) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < cute::size<0>(scores); ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < cute::size<1>(scores); ++col) {
        float& score = scores(row, col);
        score = Hooks::score(score * params.variant.scale, place(row, col), params.variant);
      }
    }
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

  /// Where the score is hidden, hooks are asked about 0 instead.
  template <class Params>
  CUTLASS_DEVICE static ChangedScore<kGradients> element(Params const& params, float score,
                                                         bool hidden, Place const& here) {
    ChangedScore<kGradients> changed{score, hidden, 1.f, 1.f, {}};
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
};

}  // namespace cute_kernels::attention
