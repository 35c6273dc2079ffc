#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/sm90/math.hpp"

// The elementwise part of a step, on (key, query) views of transposed 64 x N accumulators: a thread
// has pairs of adjacent queries, 8 apart.
namespace cute_kernels::attention {

/// A statistic of a block's queries, of which the thread needs pairs, one for each 8 queries. It is
/// spread over the warp: a pair is read from shared memory by one lane, not by eight, and shuffled
/// to the others when they need it. Read ahead of a wait for products, which it then hides under:
/// HGMMA's reads of shared memory leave little room for others.
template <int kQueries>
class ShuffledRowStatistic {
 public:
  CUTLASS_DEVICE void load(float const* rows, int thread) {
    lane_of_pair_ = thread % 4;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      int const pair = min(thread % kLanes + i * kLanes, kQueries / 2 - 1);
      own_[i] = reinterpret_cast<float2 const*>(rows)[pair];
    }
  }

  CUTLASS_DEVICE float2 operator[](int i) const {
    int const lane = lane_of_pair_ + i % 8 * 4;
    return make_float2(__shfl_sync(~0u, own_[i / 8].x, lane),
                       __shfl_sync(~0u, own_[i / 8].y, lane));
  }

 private:
  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kOwn = (kQueries / 2 + kLanes - 1) / kLanes;

  float2 own_[kOwn];
  int lane_of_pair_;
};

/// Every element of a fragment becomes function(element, its query's value).
template <class Fragment, class Statistic, class Function>
CUTLASS_DEVICE void transform_with(Fragment&& fragment, Statistic const& values,
                                   Function const& function) {
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < cute::size<1>(fragment); col += 2) {
    float2 const pair = values[col / 2];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < cute::size<0>(fragment); ++row) {
      fragment(row, col) = function(fragment(row, col), pair.x);
      fragment(row, col + 1) = function(fragment(row, col + 1), pair.y);
    }
  }
}

/// S^T becomes P^T = 2^(scale_log2 * S^T - lse_log2) in place.
template <class Scores, class Statistic>
CUTLASS_DEVICE void scores_to_probabilities(Scores& scores, Statistic const& lse_log2,
                                            float scale_log2) {
  transform_with(scores, lse_log2,
                 [&](float score, float lse) { return sm90::exp2_mufu(score * scale_log2 - lse); });
}

/// The same of S^T - lse / scale.
template <class Scores>
CUTLASS_DEVICE void scores_to_probabilities(Scores& scores, float scale_log2) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) {
    scores(i) = sm90::exp2_mufu(scores(i) * scale_log2);
  }
}

/// dP^T - delta becomes dS^T = P^T (dP^T - delta) in place. Fragments of one layout.
template <class Probabilities, class Gradients>
CUTLASS_DEVICE void gradients_of_scores(Gradients& gradients, Probabilities const& p) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(gradients); ++i) gradients(i) *= static_cast<float>(p(i));
}

/// dP^T becomes dP^T - delta in place.
template <class Gradients, class Statistic>
CUTLASS_DEVICE void subtract_delta(Gradients&& gradients, Statistic const& minus_delta) {
  transform_with(gradients, minus_delta,
                 [](float gradient, float shift) { return gradient + shift; });
}

}  // namespace cute_kernels::attention
