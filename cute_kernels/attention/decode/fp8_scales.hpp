#pragma once

#include "cute_kernels/attention/decode/fp8_warps_queries.hpp"
#include "cute_kernels/attention/decode/fp8_wide_queries.hpp"
#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/sm90/math.hpp"
#include "cute_kernels/sm90/opaque.hpp"

namespace cute_kernels::attention {

/// Of a cache that holds what its type says: nothing to do.
struct NoScales {
  template <class Format>
  CUTLASS_DEVICE NoScales(CachedCall const&, CacheSource const&, Format const&) {}
};

/// What numbers of 8 bits are multiplied by, of a consumer thread's rows of scores: products
/// of queries and keys behind S, the factors of V's rows before P V. P V is of float16 numbers, and
/// such factors may be any: a row of it is kept as a multiple of the largest one of a key that it
/// has seen so far, up to a power of 2, as P is of the largest score's.
template <class Traits>
class Fp8Scales {
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;
  using Queries =
      std::conditional_t<Traits::kByWarps, Fp8WarpsQueries<Traits>, Fp8WideQueries<Traits>>;
  static constexpr int kRows = 2;
  // Exponents, biased, between which a power of 2 and its inverse are normal.
  static constexpr uint32_t kLeast = 1u << 23;
  static constexpr uint32_t kMost = 253u << 23;
  static constexpr float kMostScale = 0x1p64f;  // which makes no infinity of a product

 public:
  CUTLASS_DEVICE Fp8Scales(CachedCall const& call, CacheSource const& source,
                           EightBits const& format)
      : queries_(call, source, format), format_(format) {}

  /// Queries of a part go to shared memory, by each `group` of threads for itself, a warpgroup.
  /// `first_row` is the group's, of the tile.
  CUTLASS_DEVICE void load_queries(Walk const& walk, int group, int first_row,
                                   SharedStorage& shared) const {
    float const unit =
        of_sequence(format_.q_of_sequence, walk) * of_sequence(format_.k_of_sequence, walk);
    queries_.load(walk, group, first_row, unit, shared);
  }
  /// The same by warps that share rows' keys.
  template <class Part>
  CUTLASS_DEVICE void load_queries(Walk const& walk, Part const& part,
                                   SharedStorage& shared) const {
    auto const factors = [&] {
      float const of_queries = of_sequence(format_.q_of_sequence, walk);
      float const of_keys = of_sequence(format_.k_of_sequence, walk);
      float const of_values = of_sequence(format_.v_of_sequence, walk);
      float const raised = format_.is_int8 ? 1.f / kRaisedUnit : 1.f;
      return float2{of_queries * of_keys * raised, of_values};
    };
    queries_.load(walk, part, factors, shared);
  }

  /// Begins a part, when queries are there. `first_row` is the group's, of the tile, and
  /// `row_of_group` the thread's, seen from it.
  CUTLASS_DEVICE void begin(Walk const& walk, int group, int first_row, int row_of_group,
                            SharedStorage const& shared) {
    // Of the tile's rows: of others nothing is written.
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      int const own = row_of_group + 8 * row;
      unit_[row] = first_row + own < walk.tile().rows ? shared.query_unit[group][own] : 1.f;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) value_top_[row] = __uint_as_float(kLeast);
  }

  /// Where nothing but the softmax looks at scores, products of queries and keys are its scores as
  /// they are, multiples of the units: one multiplication of each less.
  template <class Softmax>
  CUTLASS_DEVICE void begin_units(ScoreUnits const& units, Softmax& softmax) {
    bool fits = format_.k_of_row.data == nullptr && units.softcap == 0 && units.log2_of_unit > 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      fits = fits && unit_[row] >= 0.f && units.log2_of_unit * unit_[row] <= kMostScale;
    }
    are_products_scores_ = __all_sync(0xffffffff, fits);
    if (are_products_scores_) softmax.begin_units(unit_);
  }
  template <class Softmax>
  CUTLASS_DEVICE void end_units(ScoreUnits const& units, Softmax& softmax) const {
    if (are_products_scores_) softmax.end_units(unit_, units.log2_of_unit);
  }

  /// Products become scores. `column` is the thread's first, of the block in the stage.
  template <class Scores>
  CUTLASS_DEVICE void apply_to_scores(Scores& scores, int column, int stage,
                                      SharedStorage const& shared) const {
    using namespace cute;
    constexpr int kColumns = decltype(size<1>(scores))::value;
    if (are_products_scores_) return;
    if (format_.k_of_row.data == nullptr) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < size<0>(scores); ++row) {
        CUTLASS_PRAGMA_UNROLL
        for (int col = 0; col < kColumns; ++col) scores(row, col) *= unit_[row];
      }
      return;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < kColumns; col += 2) {
      float2 const factor = pair_of(shared.key_factors[stage], column, col);
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < size<0>(scores); ++row) {
        scores(row, col) *= unit_[row] * factor.x;
        scores(row, col + 1) *= unit_[row] * factor.y;
      }
    }
  }

  CUTLASS_DEVICE bool are_values_scaled() const { return format_.v_of_row.data != nullptr; }

  /// Turns P of a block into multiples of what a row's top becomes, when its V has landed. Keys
  /// that a row does not see count nothing, whatever their factors are: their P stays 0. Where rows
  /// are `alike`, each seeing what the others see, factors of unseen keys are 0 themselves. What O
  /// so far is to be multiplied by changes, too: whether it is more than the softmax says.
  template <class Probabilities>
  CUTLASS_DEVICE bool apply_to_probabilities(Probabilities& p, int column, int stage,
                                             SharedStorage const& shared,
                                             float (&factor_of_output)[kRows], bool alike = false) {
    float const(&factors)[Traits::kTileN] = shared.value_factors[stage];
    if constexpr (!Traits::kByWarps) {
      if (apply_small_factors(p, column, factors)) return false;
    }
    return alike ? apply_factors<true>(p, column, factors, factor_of_output)
                 : apply_factors<false>(p, column, factors, factor_of_output);
  }

  /// What a row of O is a multiple of at a part's end, with the sequence's factor of values.
  CUTLASS_DEVICE float unit_of_output(int row, float of_sequence) const {
    return are_values_scaled() ? of_sequence * value_top_[row] : of_sequence;
  }
  template <class Output>
  CUTLASS_DEVICE void apply_to_output(Output& out, Walk const& walk) const {
    float const factor = of_sequence(format_.v_of_sequence, walk);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(out); ++i) {
      out(i) *= unit_of_output(i / 2 % kRows, factor);  // pairs of columns
    }
  }

 private:
  CUTLASS_DEVICE static float of_sequence(FactorView const& view, Walk const& walk) {
    if (view.data == nullptr) return 1.f;
    return __ldg(view.data + walk.entry() * view.page_stride + walk.head() * view.head_stride);
  }
  /// Factors of a pair of columns, of which a thread has one in 8.
  CUTLASS_DEVICE static float2 pair_of(float const (&factors)[Traits::kTileN], int column,
                                       int col) {
    return *reinterpret_cast<float2 const*>(&factors[column + 4 * col]);
  }
  /// Where no factor of the block is above any row's top, nor NaN, whatever rows see: most blocks,
  /// for which one comparison of each factor is enough. By a whole warp, which is told whether it
  /// is so.
  template <class Probabilities>
  CUTLASS_DEVICE bool apply_small_factors(Probabilities& p, int column,
                                          float const (&factors)[Traits::kTileN]) const {
    constexpr int kColumns = decltype(cute::size<1>(p))::value;
    float most = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < kColumns; col += 2) {
      float2 const factor = pair_of(factors, column, col);
      most = sm90::max_nan(most, sm90::max_nan(fabsf(factor.x), fabsf(factor.y)));
    }
    bool small = true;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) small = small && most <= value_top_[row];
    if (!__all_sync(0xffffffff, small)) return false;
    column = sm90::opaque(column);  // read again: they are too many to be kept
    float inverse_top[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) inverse_top[row] = inverse(value_top_[row]);
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < kColumns; col += 2) {
      float2 const factor = pair_of(factors, column, col);
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        p(row, col) *= factor.x * inverse_top[row];
        p(row, col + 1) *= factor.y * inverse_top[row];
      }
    }
    return true;
  }

  /// The same, of rows that are alike or not.
  template <bool kAlike, class Probabilities>
  CUTLASS_DEVICE bool apply_factors(Probabilities& p, int column,
                                    float const (&factors)[Traits::kTileN],
                                    float (&factor_of_output)[kRows]) {
    constexpr int kOwnRows = decltype(cute::size<0>(p))::value;
    constexpr int kColumns = decltype(cute::size<1>(p))::value;
    float most[kOwnRows] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < kColumns; col += 2) {
      float2 const factor = pair_of(factors, column, col);
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kOwnRows; ++row) {
        // Not != 0, or what is asked of P again below would be kept in registers that are scarce.
        float const x = kAlike || p(row, col) > 0.f ? fabsf(factor.x) : 0.f;
        float const y = kAlike || p(row, col + 1) > 0.f ? fabsf(factor.y) : 0.f;
        most[row] = fmaxf(most[row], fmaxf(x, y));  // NaN does not count
      }
    }
    bool grows = false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kOwnRows; ++row) grows |= most[row] > value_top_[row];
    grows = __any_sync(0xffffffff, grows);
    if (grows) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kOwnRows; ++row) {
        float const before = value_top_[row];
        float const top = raised_top(fmaxf(before, most[row]));
        factor_of_output[row] *= before * inverse(top);
        value_top_[row] = top;
      }
    }
    float inverse_top[kOwnRows];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kOwnRows; ++row) inverse_top[row] = inverse(value_top_[row]);
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < kColumns; col += 2) {
      float2 const factor = pair_of(factors, column, col);
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kOwnRows; ++row) {
        auto const scale = [&](float& x, float factor) {
          x = kAlike || x != 0.f ? x * (factor * inverse_top[row]) : 0.f;
        };
        scale(p(row, col), factor.x);
        scale(p(row, col + 1), factor.y);
      }
    }
    return grows;
  }

  /// The next power of 2 from `most` of all threads of a row on. By a whole warp.
  CUTLASS_DEVICE static float raised_top(float most) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
    uint32_t const raised = (__float_as_uint(most) + 0x7fffffu) & 0x7f800000u;
    return __uint_as_float(min(raised, kMost));
  }
  /// Of a power of 2.
  CUTLASS_DEVICE static float inverse(float power) {
    return __uint_as_float((254u << 23) - __float_as_uint(power));
  }

  Queries queries_;
  EightBits const& format_;
  float unit_[kRows];
  bool are_products_scores_ = false;
  float value_top_[kRows];  // what rows of O are multiples of
};

}  // namespace cute_kernels::attention
