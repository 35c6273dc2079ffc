#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/sm90/math.hpp"

// The elementwise part of a step, on (key, query) views of transposed 64 x N accumulators: a thread
// has pairs of adjacent queries, 8 apart. `lse_log2` and `delta` are the block's rows in shared
// memory from the thread's first query on.
namespace cute_kernels::attention {

/// S^T becomes P^T = 2^(scale_log2 * S^T - lse_log2) in place.
template <class Scores>
CUTLASS_DEVICE void scores_to_probabilities(Scores& scores, float const* lse_log2,
                                            float scale_log2) {
  using namespace cute;
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < size<1>(scores); col += 2) {
    float2 const lse = *reinterpret_cast<float2 const*>(lse_log2 + 4 * col);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(scores); ++row) {
      scores(row, col) = sm90::exp2_mufu(scores(row, col) * scale_log2 - lse.x);
      scores(row, col + 1) = sm90::exp2_mufu(scores(row, col + 1) * scale_log2 - lse.y);
    }
  }
}

/// dP^T becomes dS^T = P^T (dP^T - delta) in place.
template <class Probabilities, class Gradients>
CUTLASS_DEVICE void gradients_of_scores(Gradients& gradients, Probabilities const& p,
                                        float const* delta) {
  using namespace cute;
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < size<1>(gradients); col += 2) {
    float2 const shift = *reinterpret_cast<float2 const*>(delta + 4 * col);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(gradients); ++row) {
      gradients(row, col) = float(p(row, col)) * (gradients(row, col) - shift.x);
      gradients(row, col + 1) = float(p(row, col + 1)) * (gradients(row, col + 1) - shift.y);
    }
  }
}

}  // namespace cute_kernels::attention
