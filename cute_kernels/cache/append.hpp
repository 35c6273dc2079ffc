#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cutlass/array.h>
#include <cutlass/numeric_types.h>

#include "cute_kernels/cache/places.hpp"
#include "cute_kernels/cache/problem.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/rounded.hpp"

// Kernels that move rows, and turn some of them on the way. Some threads have a token and go over
// the vectors of all its heads.
namespace cute_kernels::cache {

inline constexpr int kCtaThreads = 256;
inline constexpr int kWarpThreads = 32;
inline constexpr int kCtas = 4;  // of a multiprocessor: loads enough on their way

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

  CUTLASS_DEVICE Angles(Rotary const& rotary, int64_t position, int first_pair) {
    if (position < 0 || position >= rotary.positions) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPairsAtOnce; ++i) cos[i] = sin[i] = NAN;
      return;
    }
    int64_t const at_cos = position * rotary.cos_stride + first_pair;
    int64_t const at_sin = position * rotary.sin_stride + first_pair;
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
    using sm90::rounded_product, sm90::rounded_sum;
    float const x = static_cast<float>(Element(first)), y = static_cast<float>(Element(second));
    first =
        static_cast<Element>(rounded_sum(rounded_product(x, cos[i]), -rounded_product(y, sin[i])));
    second =
        static_cast<Element>(rounded_sum(rounded_product(x, sin[i]), rounded_product(y, cos[i])));
  }
};

/// What a thread moves at once.
template <class Element>
struct Unit {
  UnitPlace place;
  Vector<Element> first;
  Vector<Element> second;  // if place.is_pair()
};

/// Unit `index` of a token's row.
template <class Element>
CUTLASS_DEVICE Unit<Element> load_unit(Rows const& rows, int pairs, int batch, int row, int index) {
  Unit<Element> unit;
  unit.place = unit_place(rows.head_dim, pairs, index);
  auto const* from = attention::rows_of<Element const>(rows.from, batch, unit.place.head, row);
  unit.first = load_vector(from + unit.place.channel, rows.from_aligned);
  if (unit.place.is_pair()) {
    unit.second = load_vector(from + unit.place.second_channel, rows.from_aligned);
  }
  return unit;
}

template <class Element>
CUTLASS_DEVICE void turn_unit(Unit<Element>& unit, Rotary const& rotary, int64_t position) {
  int const channel = unit.place.channel;
  if (unit.place.is_pair()) {
    Angles<Element, kVector> const angles(rotary, position, channel);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; ++i) angles.turn(unit.first[i], unit.second[i], i);
  } else if (rotary.interleaved && channel < 2 * rotary.pairs) {
    Angles<Element, kVector / 2> const angles(rotary, position, channel / 2);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector / 2; ++i) {
      angles.turn(unit.first[2 * i], unit.first[2 * i + 1], i);
    }
  }
}

template <class Element>
CUTLASS_DEVICE void store_unit(Unit<Element> const& unit, Rows const& rows, CacheRow const& at) {
  if (at.page < 0) return;
  auto* to = attention::rows_of<Element>(rows.to, at.page, unit.place.head, at.row);
  store_vector(unit.first, to + unit.place.channel, rows.to_aligned);
  if (unit.place.is_pair()) {
    store_vector(unit.second, to + unit.place.second_channel, rows.to_aligned);
  }
}

/// How a CTA's threads are shared out.
struct Share {
  int threads_per_token;  // a multiple of a warp's, up to kCtaThreads, of which it is a divisor
};

template <class Element>
__global__ void __launch_bounds__(kCtaThreads, kCtas)
    append_kernel(AppendProblem const problem, Share const share) {
  sm90::let_next_kernel_start();
  sm90::wait_for_previous_kernel();
  Tokens const& tokens = problem.tokens;
  Places const& places = problem.places;
  int const token =
      blockIdx.x * (kCtaThreads / share.threads_per_token) + threadIdx.x / share.threads_per_token;
  int const pairs = distant_pairs(problem.rotary);
  int const units_k = problem.k.heads * units_of_head(problem.k.head_dim, pairs);
  int const units = units_k + problem.v.heads * units_of_head(problem.v.head_dim, 0);
  int index = threadIdx.x % share.threads_per_token;
  TokenPlace const of = token < tokens.total ? place_of(tokens, token) : TokenPlace{-1, 0};
  if (of.entry >= 0 && index < units) {
    bool const packed = tokens.cu_seqlens != nullptr;
    int const batch = packed ? 0 : of.entry, row = packed ? token : of.index;
    auto load = [&] {
      return index < units_k ? load_unit<Element>(problem.k, pairs, batch, row, index)
                             : load_unit<Element>(problem.v, 0, batch, row, index - units_k);
    };
    // The first load is on its way while the place is looked up.
    Unit<Element> unit = load();
    CacheRow const place =
        cache_row(places, of.entry, int64_t{problem.lengths[of.entry]} + of.index);
    int64_t const position = int64_t{problem.positions[of.entry]} + of.index;
    while (true) {
      if (index < units_k) {
        turn_unit(unit, problem.rotary, position);
        store_unit(unit, problem.k, place);
      } else {
        store_unit(unit, problem.v, place);
      }
      index += share.threads_per_token;
      if (index >= units) break;
      unit = load();
    }
  }
  if (blockIdx.x != 0) return;
  for (int entry = threadIdx.x; entry < tokens.batch; entry += kCtaThreads) {
    problem.lengths_after[entry] =
        length_after(places, problem.lengths[entry], rows_of_entry(tokens, entry));
  }
}

template <class Element>
__global__ void __launch_bounds__(kCtaThreads, kCtas)
    rotate_kernel(RotateProblem const problem, Share const share) {
  sm90::let_next_kernel_start();
  sm90::wait_for_previous_kernel();
  Tokens const& tokens = problem.tokens;
  Rows const& x = problem.x;
  int const token =
      blockIdx.x * (kCtaThreads / share.threads_per_token) + threadIdx.x / share.threads_per_token;
  if (token >= tokens.total) return;
  int const pairs = distant_pairs(problem.rotary);
  int const units = x.heads * units_of_head(x.head_dim, pairs);
  TokenPlace const of = place_of(tokens, token);
  bool const packed = tokens.cu_seqlens != nullptr;
  int const batch = packed ? 0 : of.entry, row = packed ? token : of.index;
  int64_t const position =
      of.entry < 0 ? 0 : int64_t{problem.positions[of.entry]} + (problem.advance ? of.index : 0);
  for (int index = threadIdx.x % share.threads_per_token; index < units;
       index += share.threads_per_token) {
    Unit<Element> unit = load_unit<Element>(x, pairs, batch, row, index);
    if (of.entry >= 0) {
      turn_unit(unit, problem.rotary, position);
    } else {
      unit.first.clear();
      unit.second.clear();
    }
    store_unit(unit, x, {batch, row});
  }
}

}  // namespace cute_kernels::cache
