#pragma once

#include <algorithm>
#include <cmath>

#include <cutlass/array.h>
#include <cutlass/bfloat16.h>

#include "cute_kernels/sm90/math.hpp"

// What a block's queries subtract, lse from S and delta from dP: written by the preprocess kernel,
// brought by TMA with Q. A query that sees nothing, or does not exist, has lse = -inf; its P is 0.
namespace cute_kernels::attention {

enum class Statistic { kLse, kDelta };

/// What the scores are multiplied by. A softmax scale below 2^-100 does as well as that: all scores
/// are 0 but for inputs beyond 2^40, and lse / scale stays finite.
inline float scale_of_scores(float softmax_scale) { return std::max(softmax_scale, 0x1p-100f); }

/// For threads to read.
template <int kQueries>
struct StatisticValues {
  float lse_log2[kQueries];  // +inf where P is 0
  float minus_delta[kQueries];

  CUTLASS_DEVICE void set(int query, float lse, float minus_delta, float) {
    lse_log2[query] = lse == -INFINITY ? INFINITY : lse * sm90::kLog2e;
    this->minus_delta[query] = minus_delta;
  }
};

/// For WGMMA to add up: S^T and dP^T begin as a product of ones and a statistic's three parts,
/// which hold a float's 24 bits. So no thread reads it, for which it would have to get through
/// shared memory's port once for each of the warps, nor keeps it in registers.
template <int kQueries>
struct StatisticParts {
  static constexpr int kColumns = 8;  // 16 bytes, a row of a core matrix
  static constexpr int kParts = 3;

  using Row = cutlass::AlignedArray<cutlass::bfloat16_t, kColumns>;
  Row rows[kQueries];

  /// Where its parts begin in a row.
  static constexpr int first_column(Statistic statistic) {
    return statistic == Statistic::kLse ? 0 : kParts;
  }

  CUTLASS_DEVICE void set(int query, float lse, float minus_delta, float scale) {
    // Finite, because other products multiply it by 0; at the least scale_of_scores() far enough.
    constexpr float kFar = 0x1p120f;
    Row row;
    row.clear();
    auto split = [&](Statistic statistic, float value) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kParts; ++i) {
        auto const part = static_cast<cutlass::bfloat16_t>(value);
        row[first_column(statistic) + i] = part;
        value -= static_cast<float>(part);
      }
    };
    split(Statistic::kLse, lse == -INFINITY ? -kFar : -lse / scale);
    split(Statistic::kDelta, minus_delta);
    rows[query] = row;
  }
};

}  // namespace cute_kernels::attention
