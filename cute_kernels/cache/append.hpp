#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cutlass/array.h>
#include <cutlass/numeric_types.h>

#include "cute_kernels/cache/places.hpp"
#include "cute_kernels/cache/problem.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/rounded.hpp"

// The kernel that moves rows, and turns some of them on the way. Some threads have a token and go
// over the vectors of all its heads.
namespace cute_kernels::cache {

inline constexpr int kCtaThreads = 256;
inline constexpr int kWarpThreads = 32;
inline constexpr int kCtas = 4;  // of a multiprocessor, so that enough loads are on their way

template <class Element>
using Vector = cutlass::AlignedArray<Element, kVector>;

template <class Element>
CUTLASS_DEVICE Vector<Element> load_vector(Element const* from, bool aligned) {
  if (aligned) return *reinterpret_cast<Vector<Element> const*>(from);
  Vector<Element> vector;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) vector[i] = from[i];
  return vector;
}

template <class Element>
CUTLASS_DEVICE void store_vector(Vector<Element> const& vector, Element* to, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Vector<Element>*>(to) = vector;
    return;
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) to[i] = vector[i];
}

/// Numbers of a table from `from` on, as float.
template <int kCount, class Number>
CUTLASS_DEVICE void load_numbers(float (&numbers)[kCount], Number const* from, bool aligned) {
  constexpr int kAtOnce = kCount * sizeof(Number) > 16 ? 16 / sizeof(Number) : kCount;
  using Some = cutlass::AlignedArray<Number, kAtOnce>;
  CUTLASS_PRAGMA_UNROLL
  for (int first = 0; first < kCount; first += kAtOnce) {
    if (aligned) {
      Some const some = *reinterpret_cast<Some const*>(from + first);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kAtOnce; ++i) numbers[first + i] = static_cast<float>(Number(some[i]));
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        numbers[first + i] = static_cast<float>(from[first + i]);
      }
    }
  }
}

/// The cosines and sines of some pairs at a position.
template <class Element, int kPairsAtOnce>
struct Angles {
  float cos[kPairsAtOnce];
  float sin[kPairsAtOnce];

  /// `row`: of the tables, -1 where they have none.
  CUTLASS_DEVICE Angles(Rotary const& rotary, int row, int first_pair) {
    if (row < 0) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPairsAtOnce; ++i) cos[i] = sin[i] = NAN;
      return;
    }
    int64_t const at_cos = row * rotary.cos_stride + first_pair;
    int64_t const at_sin = row * rotary.sin_stride + first_pair;
    if (rotary.is_float32) {
      load_numbers(cos, static_cast<float const*>(rotary.cos) + at_cos, rotary.aligned);
      load_numbers(sin, static_cast<float const*>(rotary.sin) + at_sin, rotary.aligned);
    } else {
      load_numbers(cos, static_cast<Element const*>(rotary.cos) + at_cos, rotary.aligned);
      load_numbers(sin, static_cast<Element const*>(rotary.sin) + at_sin, rotary.aligned);
    }
  }

  /// Turns pair i, in fp32: rounded after each product and after their sum.
  template <class Channel>
  CUTLASS_DEVICE void turn(Channel&& first, Channel&& second, int i) const {
    using sm90::rounded_difference, sm90::rounded_product, sm90::rounded_sum;
    float const x = static_cast<float>(Element(first)), y = static_cast<float>(Element(second));
    first = static_cast<Element>(
        rounded_difference(rounded_product(x, cos[i]), rounded_product(y, sin[i])));
    second =
        static_cast<Element>(rounded_sum(rounded_product(x, sin[i]), rounded_product(y, cos[i])));
  }
};

/// What a thread moves of a token at once.
template <class Element>
struct Unit {
  Vector<Element> first;
  Vector<Element> second;  // if its place is that of a pair
};

template <class Element>
CUTLASS_DEVICE void load_unit(Unit<Element>& unit, UnitPlace const& place, Rows const& rows,
                              SourceRow const& source) {
  auto const* from =
      attention::rows_of<Element const>(rows.from, source.batch, place.head, source.row);
  unit.first = load_vector(from + place.channel, rows.from_aligned);
  if (place.is_pair()) unit.second = load_vector(from + place.second_channel, rows.from_aligned);
}

/// `row`: of the tables.
template <class Element>
CUTLASS_DEVICE void turn_unit(Unit<Element>& unit, UnitPlace const& place, Rotary const& rotary,
                              int row) {
  if (place.is_pair()) {
    Angles<Element, kVector> const angles(rotary, row, place.channel);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; ++i) angles.turn(unit.first[i], unit.second[i], i);
  } else if (rotary.interleaved && place.channel < 2 * rotary.pairs) {
    Angles<Element, kVector / 2> const angles(rotary, row, place.channel / 2);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector / 2; ++i) {
      angles.turn(unit.first[2 * i], unit.first[2 * i + 1], i);
    }
  }
}

template <class Element>
CUTLASS_DEVICE void store_unit(Unit<Element> const& unit, UnitPlace const& place, Rows const& rows,
                               CacheRow const& to_row) {
  auto* to = attention::rows_of<Element>(rows.to, to_row.page, place.head, to_row.row);
  store_vector(unit.first, to + place.channel, rows.to_aligned);
  if (place.is_pair()) store_vector(unit.second, to + place.second_channel, rows.to_aligned);
}

/// How a CTA's threads are shared out: to tokens, each of which is kTokens of them at once so that
/// many loads are on their way. A thread has the same units of all its tokens.
struct Share {
  int threads_per_token;  // a multiple of a warp's, up to kCtaThreads, of which it is a divisor

  CUTLASS_HOST_DEVICE constexpr int stride() const { return kCtaThreads / threads_per_token; }
};

inline constexpr int kAtOnce = 2;  // of many tokens, those that a thread has

/// Few tokens have a thread for each unit; of many, a thread has several units.
constexpr Share share_of(int units, bool many) {
  int const most = many ? 2 * kWarpThreads : kCtaThreads;
  int threads = kWarpThreads;
  while (threads < units && threads < most) threads *= 2;
  return {threads};
}

constexpr int ctas_of(Tokens const& tokens, Share share, bool many) {
  int const tokens_per_cta = share.stride() * (many ? kAtOnce : 1);
  return tokens.total == 0 ? 0 : (tokens.total - 1) / tokens_per_cta + 1;
}

/// The tokens of a thread.
template <class Element, int kTokens>
struct Batch {
  Tokens const& tokens;
  Share share;
  int first;  // then every share.stride()-th
  UnitPlace place{};
  Unit<Element> units[kTokens];

  /// `cta`: the number of this one.
  CUTLASS_DEVICE Batch(Tokens const& tokens, Share const& share, int cta)
      : tokens(tokens),
        share(share),
        first(cta * (kTokens * share.stride()) + threadIdx.x / share.threads_per_token) {}

  CUTLASS_DEVICE int token(int i) const { return first + i * share.stride(); }
  CUTLASS_DEVICE bool exists(int i) const { return token(i) < tokens.total; }

  /// Unit `index` of each token's row.
  CUTLASS_DEVICE void load(Rows const& rows, int pairs, int index) {
    place = unit_place(rows.head_dim, pairs, index);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      if (exists(i)) load_unit(units[i], place, rows, source_row(tokens, token(i)));
    }
  }
};

template <class Element, int kTokens>
CUTLASS_DEVICE void append_rows(AppendProblem const& problem, Share const& share, int cta) {
  Tokens const& tokens = problem.tokens;
  Batch<Element, kTokens> batch(tokens, share, cta);
  int const pairs = distant_pairs(problem.rotary);
  int const units_k = units_of_row(problem.k, pairs);
  int const units = units_k + units_of_row(problem.v, 0);
  int const first_index = threadIdx.x % share.threads_per_token;
  CacheRow places[kTokens];
  int positions[kTokens];
  for (int index = first_index; index < units; index += share.threads_per_token) {
    bool const is_k = index < units_k;
    is_k ? batch.load(problem.k, pairs, index) : batch.load(problem.v, 0, index - units_k);
    // The first loads are on their way while the places are looked up.
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      if (index != first_index) break;
      places[i] = {-1, 0};
      if (!batch.exists(i)) continue;
      TokenPlace const of = place_of(tokens, batch.token(i));
      if (of.entry < 0) continue;
      places[i] =
          cache_row(problem.places, of.entry, int64_t{problem.lengths[of.entry]} + of.index);
      positions[i] = table_row(problem.rotary, int64_t{problem.positions[of.entry]} + of.index);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      if (places[i].page < 0) continue;
      if (is_k) turn_unit(batch.units[i], batch.place, problem.rotary, positions[i]);
      store_unit(batch.units[i], batch.place, is_k ? problem.k : problem.v, places[i]);
    }
  }
}

template <class Element, int kTokens>
CUTLASS_DEVICE void turn_queries(AppendProblem const& problem, Share const& share, int cta) {
  Queries const& queries = problem.queries;
  Batch<Element, kTokens> batch(queries.tokens, share, cta);
  int const pairs = distant_pairs(problem.rotary);
  int const units = units_of_row(queries.rows, pairs);
  int const first_index = threadIdx.x % share.threads_per_token;
  TokenPlace places[kTokens];
  int positions[kTokens];
  for (int index = first_index; index < units; index += share.threads_per_token) {
    batch.load(queries.rows, pairs, index);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      if (index != first_index) break;
      if (!batch.exists(i)) continue;
      places[i] = place_of(queries.tokens, batch.token(i));
      if (places[i].entry < 0) continue;
      int const advance = queries.advance ? places[i].index : 0;
      positions[i] =
          table_row(problem.rotary, int64_t{problem.positions[places[i].entry]} + advance);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      if (!batch.exists(i)) continue;
      Unit<Element>& unit = batch.units[i];
      if (places[i].entry >= 0) {
        turn_unit(unit, batch.place, problem.rotary, positions[i]);
      } else {
        unit.first.clear();
        unit.second.clear();
      }
      SourceRow const source = source_row(queries.tokens, batch.token(i));
      store_unit(unit, batch.place, queries.rows, {source.batch, source.row});
    }
  }
}

/// By one CTA.
CUTLASS_DEVICE void write_lengths(AppendProblem const& problem) {
  for (int entry = threadIdx.x; entry < problem.tokens.batch; entry += kCtaThreads) {
    problem.lengths_after[entry] =
        length_after(problem.places, problem.lengths[entry], rows_of_entry(problem.tokens, entry));
  }
}

/// The first append_ctas CTAs, at least one, append; the others turn queries.
template <class Element, int kTokens>
__global__ void __launch_bounds__(kCtaThreads, kCtas)
    append_kernel(AppendProblem const problem, Share const share, Share const share_of_queries,
                  int const append_ctas) {
  sm90::let_next_kernel_start();
  sm90::wait_for_previous_kernel();
  int const cta = static_cast<int>(blockIdx.x);
  if (cta >= append_ctas) {
    turn_queries<Element, kTokens>(problem, share_of_queries, cta - append_ctas);
    return;
  }
  append_rows<Element, kTokens>(problem, share, cta);
  if (cta == 0) write_lengths(problem);
}

}  // namespace cute_kernels::cache
