#pragma once

#include <cutlass/array.h>
#include <cute/tensor.hpp>

#include "cute_kernels/sm90/math.hpp"

// The elementwise part of a step, on (key, query) views of transposed 64 x N accumulators: a thread
// has pairs of adjacent queries, 8 apart.
namespace cute_kernels::attention {

/// The thread's pairs of a statistic of the block's queries, which stands in shared memory from the
/// thread's first query on. Read ahead of a wait for products, which it then hides under.
template <int kQueries>
using RowStatistic = cutlass::Array<float2, kQueries / 8>;

template <int kQueries>
CUTLASS_DEVICE RowStatistic<kQueries> load_row_statistic(float const* rows) {
  RowStatistic<kQueries> pairs;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kQueries / 8; ++i) pairs[i] = *reinterpret_cast<float2 const*>(rows + 8 * i);
  return pairs;
}

/// S^T becomes P^T = 2^(scale_log2 * S^T - lse_log2) in place.
template <class Scores, class Statistic>
CUTLASS_DEVICE void scores_to_probabilities(Scores& scores, Statistic const& lse_log2,
                                            float scale_log2) {
  using namespace cute;
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < size<1>(scores); col += 2) {
    float2 const lse = lse_log2[col / 2];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(scores); ++row) {
      scores(row, col) = sm90::exp2_mufu(scores(row, col) * scale_log2 - lse.x);
      scores(row, col + 1) = sm90::exp2_mufu(scores(row, col + 1) * scale_log2 - lse.y);
    }
  }
}

/// What the product dP^T is added to, so that dP^T - delta costs nothing.
template <class Gradients, class Statistic>
CUTLASS_DEVICE void start_from(Gradients& gradients, Statistic const& minus_delta) {
  using namespace cute;
  CUTLASS_PRAGMA_UNROLL
  for (int col = 0; col < size<1>(gradients); col += 2) {
    float2 const shift = minus_delta[col / 2];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(gradients); ++row) {
      gradients(row, col) = shift.x;
      gradients(row, col + 1) = shift.y;
    }
  }
}

/// dP^T - delta becomes dS^T = P^T (dP^T - delta) in place. Fragments of one layout.
template <class Probabilities, class Gradients>
CUTLASS_DEVICE void gradients_of_scores(Gradients& gradients, Probabilities const& p) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(gradients); ++i) gradients(i) *= static_cast<float>(p(i));
}

}  // namespace cute_kernels::attention
