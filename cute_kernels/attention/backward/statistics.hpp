#pragma once

#include <cmath>
#include <cstdint>

#include <cutlass/array.h>
#include <cutlass/bfloat16.h>

#include "cute_kernels/sm90/math.hpp"

// What a block's queries subtract, lse from S and delta from dP: written by the preprocess kernel,
// brought by TMA with Q. A query that sees nothing, or does not exist, has lse = -inf; its P is 0.
namespace cute_kernels::attention {

enum class Statistic { kLse, kDelta };

/// Whether a query's statistics ask for care: Q or dO may not be finite, also in rows that do not
/// see every key, or one fp32 does not hold lse closely enough for P to stay below 1 by itself. Of
/// a query that sees nothing they do not tell: are_tame() does.
CUTLASS_DEVICE bool is_alarming(float lse, float minus_delta) {
  constexpr float kLarge = 0x1p12f;
  return !(fabsf(lse) <= kLarge || lse == -INFINITY) || !isfinite(minus_delta);
}

/// Whether 0 is what they make with a P of 0.
template <int kCount>
CUTLASS_DEVICE bool are_tame(cutlass::Array<float, kCount> const& values) {
  constexpr float kLarge = 0x1p60f;  // products with keys and values, and their sums, are finite
  bool tame = true;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kCount; ++i) tame &= fabsf(values[i]) < kLarge;
  return tame;
}

/// For threads to read.
template <int kQueries>
struct StatisticValues {
  float lse_log2[kQueries];  // +inf where P is 0
  float minus_delta[kQueries];

  CUTLASS_DEVICE void set(int query, float lse, float minus_delta, float) {
    lse_log2[query] = isinf(lse) ? INFINITY : lse * sm90::kLog2e;
    this->minus_delta[query] = minus_delta;
  }
};

/// For WGMMA to add up: S^T and dP^T begin as a product of ones and a statistic's three parts,
/// which hold a float's 24 bits. So no thread reads it, for which it would have to get through
/// shared memory's port once for each of the warps, nor keeps it in registers. kThreadsReadLse:
/// lse's bits are 16, 8 and 8 instead, whose products are times 0.
template <int kQueries, bool kThreadsReadLse = false>
struct StatisticParts {
  static constexpr int kColumns = 8;  // 16 bytes, a row of a core matrix
  static constexpr int kParts = 3;

  using Row = cutlass::AlignedArray<cutlass::bfloat16_t, kColumns>;
  Row rows[kQueries];

  /// Where its parts begin in a row.
  static constexpr int first_column(Statistic statistic) {
    return statistic == Statistic::kLse ? 0 : kParts;
  }

  /// In the unit that it was set in, for threads to read.
  CUTLASS_DEVICE float minus_lse(int query) const {
    static_assert(kThreadsReadLse && first_column(Statistic::kLse) == 0);
    uint2 const parts = reinterpret_cast<uint2 const&>(rows[query]);  // four bf16
    return __uint_as_float(__byte_perm(parts.x, parts.y, 0x1024));
  }

  CUTLASS_DEVICE float minus_delta(int query) const {
    static_assert(first_column(Statistic::kDelta) == 3);
    auto const* const pairs = reinterpret_cast<uint32_t const*>(&rows[query]);
    return upper_half(pairs[1]) + (upper_half(pairs[2] << 16) + upper_half(pairs[2]));
  }

  /// Both statistics' products meet the parts of the other, times 0. So a delta that is not finite
  /// becomes three times the largest bf16, which only their sum is not; a row whose lse is NaN is
  /// NaN in every product.
  CUTLASS_DEVICE void set(int query, float lse, float minus_delta, float scale) {
    constexpr float kFar = 0x1p120f;  // at the least scale_of_scores() far enough
    constexpr float kLargest = 0x1.fep127f;
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
    // A sink may be larger than any score, so that in their unit it is beyond a float.
    float const minus_lse = sm90::max_nan(-lse / scale, -0x1p127f);
    float const far_or_lse = isinf(lse) ? -kFar : minus_lse;
    if constexpr (kThreadsReadLse) {
      uint32_t const bits = __float_as_uint(far_or_lse);
      row[0] = cutlass::bfloat16_t::bitcast(bits >> 16);
      row[1] = cutlass::bfloat16_t::bitcast(bits >> 8 & 0xff);
      row[2] = cutlass::bfloat16_t::bitcast(bits & 0xff);
    } else {
      split(Statistic::kLse, far_or_lse);
    }
    split(Statistic::kDelta, isfinite(minus_delta) ? minus_delta : 0.f);
    if (!isfinite(minus_delta)) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kParts; ++i) {
        row[first_column(Statistic::kDelta) + i] = cutlass::bfloat16_t(kLargest);
      }
    }
    rows[query] = row;
  }

 private:
  /// The bf16 there as a float.
  CUTLASS_DEVICE static float upper_half(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
  }
};

}  // namespace cute_kernels::attention
