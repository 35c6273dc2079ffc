#pragma once

#include <cute/config.hpp>

#include "cute_kernels/cache/append.hpp"
#include "cute_kernels/cache/fp8_problem.hpp"
#include "cute_kernels/fp8/hadamard.hpp"
#include "cute_kernels/fp8/quantize.hpp"

// The kernel that moves rows to caches of 8 bits. Some lanes of a warp have a head of a token,
// kVector channels each. Its arithmetic is that of python/cute_kernels/cache/eight_bits.py, to the
// bit.
namespace cute_kernels::cache {

inline constexpr float kSmallestTop = 0x1p-100f;  // of a row that does not become 0

/// A row of a head, in the registers of `lanes` neighbouring lanes; whole warps come here.
struct HeadRow {
  float x[kVector];
  int lanes;
  int lane;

  CUTLASS_DEVICE int channel() const { return lane * kVector; }
};

/// As append_rows() turns rows, and rounds them.
template <class Element>
CUTLASS_DEVICE void turn_row(HeadRow& row, Rotary const& rotary, int position) {
  float (&x)[kVector] = row.x;
  int const channel = row.channel();
  if (rotary.interleaved) {
    if (channel >= 2 * rotary.pairs) return;
    Angles<Element, kVector / 2> const angles(rotary, position, channel / 2);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector / 2; ++i) angles.turn(x[2 * i], x[2 * i + 1], i);
    return;
  }
  bool const is_first = channel < rotary.pairs;
  int const other_lane = row.lane + (is_first ? 1 : -1) * (rotary.pairs / kVector);
  float other[kVector];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) other[i] = __shfl_sync(0xffffffff, x[i], other_lane, row.lanes);
  if (channel >= 2 * rotary.pairs) return;
  Angles<Element, kVector> const angles(rotary, position,
                                        is_first ? channel : channel - rotary.pairs);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) {
    is_first ? angles.turn(x[i], other[i], i) : angles.turn(other[i], x[i], i);
  }
}

/// What the row is a multiple of when it is rounded: its largest magnitude becomes `largest`. NaN
/// if an element is, infinite if one is.
CUTLASS_DEVICE float factor_of_row(HeadRow const& row, float largest) {
  float top = 0.f;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) top = sm90::max_nan(top, fabsf(row.x[i]));
  for (int lanes = 1; lanes < row.lanes; lanes *= 2) {
    top = sm90::max_nan(top, __shfl_xor_sync(0xffffffff, top, lanes));
  }
  return top < kSmallestTop ? 0.f : __fdiv_rn(top, largest);
}

CUTLASS_DEVICE float* factor_at(FactorView const& view, int page, int slot, int head) {
  return const_cast<float*>(view.data) + page * view.page_stride + slot * view.slot_stride +
         head * view.head_stride;
}

/// The factor of a row that goes to `place` in the cache: one that is given, or its own, written.
CUTLASS_DEVICE float settle_factor(Factors const& factors, HeadRow const& row, float largest,
                                   int entry, int head, CacheRow const& place, bool there) {
  if (factors.written.data != nullptr) {
    float const factor = factor_of_row(row, largest);
    if (there && row.lane == 0) {
      *factor_at(factors.written, place.page, place.row, head) = factor;
    }
    return factor;
  }
  if (!there) return 1.f;
  if (factors.of_sequence.data != nullptr) return *factor_at(factors.of_sequence, entry, 0, head);
  if (factors.of_row.data == nullptr) return 1.f;
  return *factor_at(factors.of_row, place.page, place.row, head);
}

CUTLASS_DEVICE void store_row(HeadRow const& row, float factor, bool is_int8, bool aligned,
                              uint8_t* to) {
  float x[kVector];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) x[i] = factor == 0.f ? 0.f : __fdiv_rn(row.x[i], factor);
  uint2 const bytes = is_int8 ? uint2{fp8::round_to<int8_t>(x[0], x[1], x[2], x[3]),
                                      fp8::round_to<int8_t>(x[4], x[5], x[6], x[7])}
                              : uint2{fp8::round_to<cutlass::float_e4m3_t>(x[0], x[1], x[2], x[3]),
                                      fp8::round_to<cutlass::float_e4m3_t>(x[4], x[5], x[6], x[7])};
  if (aligned) {
    *reinterpret_cast<uint2*>(to) = bytes;
    return;
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) to[i] = (i < 4 ? bytes.x : bytes.y) >> 8 * (i % 4);
}

/// Row `index` of all heads of all tokens, K's before V's.
template <class Element>
CUTLASS_DEVICE void append_head(Fp8AppendProblem const& problem, int lanes, int64_t index) {
  int const heads = problem.k.heads;
  int const token = static_cast<int>(index / (2 * heads));
  int const number = static_cast<int>(index % (2 * heads));
  bool const is_k = number < heads;
  int const head = is_k ? number : number - heads;
  Rows const& rows = is_k ? problem.k : problem.v;
  HeadRow row{{}, lanes, static_cast<int>(threadIdx.x) % lanes};
  bool const exists = token < problem.tokens.total;
  bool const has_channels = row.channel() < rows.head_dim;
  CacheRow place{-1, 0};
  int position = -1, entry = 0;
  if (exists) {
    SourceRow const source = source_row(problem.tokens, token);
    if (has_channels) {
      auto const* const from =
          attention::rows_of<Element const>(rows.from, source.batch, head, source.row);
      Vector<Element> const vector = load_vector(from + row.channel(), rows.from_aligned);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kVector; ++i) row.x[i] = static_cast<float>(Element(vector[i]));
    }
    TokenPlace const of = place_of(problem.tokens, token);
    if (of.entry >= 0) {
      entry = of.entry;
      place = cache_row(problem.places, entry, int64_t{problem.lengths[entry]} + of.index);
      position = table_row(problem.rotary, int64_t{problem.positions[entry]} + of.index);
    }
  }
  // K's and V's heads share warps: all their lanes come to the shuffles.
  if (problem.rotary.pairs > 0) {
    HeadRow turned = row;
    turn_row<Element>(turned, problem.rotary, position);
    if (is_k) row = turned;
  }
  if (problem.rotated) {
    HeadRow spread = row;
    fp8::flip_signs(spread.x, problem.signs, row.channel());
    fp8::hadamard_transform(spread.x, problem.k.head_dim / kVector);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (is_k) row.x[i] = sm90::rounded_product(spread.x[i], problem.norm);
    }
  }
  Factors const& factors = is_k ? problem.k_factors : problem.v_factors;
  float const largest =
      problem.is_int8 ? fp8::kLargest<int8_t> : fp8::kLargest<cutlass::float_e4m3_t>;
  bool const there = place.page >= 0;
  float const factor = settle_factor(factors, row, largest, entry, head, place, there);
  if (!there || !has_channels) return;
  auto* const to = attention::rows_of<uint8_t>(rows.to, place.page, head, place.row);
  store_row(row, factor, problem.is_int8, rows.to_aligned, to + row.channel());
}

/// The first append_ctas CTAs, at least one, append; the others turn queries.
template <class Element>
__global__ void __launch_bounds__(kCtaThreads)
    fp8_append_kernel(CUTE_GRID_CONSTANT Fp8AppendProblem const problem, int const lanes,
                      Share const share_of_queries, int const append_ctas) {
  sm90::let_next_kernel_start();
  sm90::wait_for_previous_kernel();
  int const cta = static_cast<int>(blockIdx.x);
  if (cta >= append_ctas) {
    turn_queries<Element, 1>(problem, share_of_queries, cta - append_ctas);
    return;
  }
  if (problem.k.heads > 0) {  // which rows are divided by
    append_head<Element>(problem, lanes, (int64_t{cta} * kCtaThreads + threadIdx.x) / lanes);
  }
  if (cta == 0) write_lengths(problem);
}

}  // namespace cute_kernels::cache
