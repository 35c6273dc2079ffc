#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/fp8_convert.hpp"
#include "cute_kernels/attention/decode/fp8_warps_traits.hpp"
#include "cute_kernels/sm90/warp_mma.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// A slice of keys or values in shared memory, as a warp multiplies it: 16 rows of queries or of P
/// by kSliceKeys, 32 or 8. ldmatrix brings numbers of 8 bits to where mma.sync wants pairs of 16:
/// of a row of K a lane gets four columns that follow one another, of V, transposed, two columns of
/// two keys. So columns of a chunk are in an order of their own, of Q and of K the same, and a lane
/// has four neighbours of O. ldmatrix takes four matrices of 8 keys at a time, of a chunk or, where
/// a slice has no more keys, of four chunks.
template <class Traits, int kSliceKeys = Traits::Part::kKeys>
class Fp8WarpsOperands {
  using SharedStorage = typename Traits::SharedStorage;
  static constexpr int kLanes = Traits::kLanes;
  static constexpr int kChunk = Traits::kChunk;
  static constexpr int kChunks = Traits::kChunks;
  static constexpr int kMatricesAtOnce = 4;

 public:
  static constexpr int kKeys = kSliceKeys;

 private:
  static constexpr int kMatrices = kKeys / 8;
  static constexpr int kChunksAtOnce = kMatricesAtOnce / kMatrices;
  static_assert(kMatrices == 1 || kMatrices == kMatricesAtOnce);
  static_assert(kLanes == 8 * kMatricesAtOnce, "a lane knows where one row is");
  // Chunks that ldmatrix takes at a time are neighbours to the swizzle.
  static_assert(Traits::kSwizzleBytes / kChunk % kChunksAtOnce == 0);

 public:
  /// As of WGMMA: pairs of keys, of either row, every 8.
  using LayoutScores = cute::Layout<
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::Int<kMatrices>>, cute::_1, cute::_1>>;
  /// Columns of a chunk: even and odd ones are products of their own.
  using LayoutOutput =
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::_2, cute::Int<kChunks>>>;

  /// (row, column) of the first kRows of a thread's rows of scores.
  template <int kRows, class Scores>
  CUTLASS_DEVICE static auto score_rows(Scores& scores) {
    using namespace cute;
    return make_tensor(
        scores.data(),
        Layout<Shape<Int<kRows>, Shape<_2, Int<kMatrices>>>, Stride<_2, Stride<_1, _4>>>{});
  }
  /// The same of O: four columns that follow one another, of every chunk.
  template <int kRows, class Output>
  CUTLASS_DEVICE static auto output_rows(Output& out) {
    return columns_of<kChunks, kRows>(out.data());
  }
  /// Of kCount chunks.
  template <int kCount, int kRows = 2, class Data>
  CUTLASS_DEVICE static auto columns_of(Data data) {
    using namespace cute;
    return make_tensor(
        data,
        Layout<Shape<Int<kRows>, Shape<_2, _2, Int<kCount>>>, Stride<_2, Stride<_4, _1, _8>>>{});
  }
  CUTLASS_DEVICE static int first_output_column() { return threadIdx.x % 4 * 4; }

  /// A warp's queries: A operands of all chunks.
  class Queries {
   public:
    CUTLASS_DEVICE explicit Queries(uint4 const (&shared)[kChunks][kLanes])
        : from_(&shared[0][threadIdx.x % kLanes]) {
      if constexpr (Traits::kQueriesInRegisters) {
        CUTLASS_PRAGMA_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) kept_[chunk] = from_[chunk * kLanes];
      }
    }
    CUTLASS_DEVICE uint4 operator()(int chunk) const {
      if constexpr (Traits::kQueriesInRegisters) return kept_[chunk];
      return from_[chunk * kLanes];
    }

   private:
    uint4 const* from_;
    uint4 kept_[Traits::kQueriesInRegisters ? kChunks : 1];
  };

  /// The rows from `row` on of a stage.
  CUTLASS_DEVICE Fp8WarpsOperands(uint8_t const* stages, int stage, int row)
      : block_(stages + stage * Traits::kStageElements), row_(row) {}

  /// What products of queries and int8 numbers begin with, which are raised: so is what that adds
  /// up to. Of each of a thread's four elements of a product.
  CUTLASS_DEVICE static void begin_products(Queries const& queries, float (&begin)[4]) {
    uint32_t const raised = raised_halves_of_int8(0).x;  // of 0
    float sums[4] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      sm90::multiply_add(sums, queries(chunk), raised, raised);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) begin[i] = -sums[i];
  }

  /// S = Q K^T; products begin with `begin`, and are of int8 numbers times kRaisedUnit.
  template <bool kInt8, class Scores>
  CUTLASS_DEVICE void multiply_queries(Queries const& queries, float const (&begin)[4],
                                       Scores& scores) const {
    // Of few keys each chunk of four has a sum of its own: it is the chain's length that counts.
    float sums[kMatricesAtOnce][4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4 * kMatricesAtOnce; ++i) {
      sums[i / 4][i % 4] = i / 4 < kMatrices || kMatrices > 1 ? begin[i % 4] : 0.f;
    }
    uint32_t const lanes_row = lanes_place();
    CUTLASS_PRAGMA_UNROLL
    for (int chunk = 0; chunk < kChunks; chunk += kChunksAtOnce) {
      uint32_t bytes[kMatricesAtOnce];
      begin_chunk(chunk);
      sm90::load_matrices(bytes, place_of_chunk(lanes_row, chunk));
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kMatricesAtOnce; ++i) {
        uint4 const a = queries(chunk + i / kMatrices);
        uint2 const b = kInt8 ? raised_halves_of_int8(bytes[i]) : halves_of<false>(bytes[i]);
        sm90::multiply_add(sums[i], a, b.x, b.y);
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      scores(i) = sums[i / 4][i % 4];
      if constexpr (kMatrices == 1) {
        scores(i) = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
      }
    }
  }

  /// O += P V, with 0 in place of NaN, of the first kRows of a thread's rows; others have no P.
  template <bool kInt8, bool kWithoutNan, int kRows, class Scores, class Output>
  CUTLASS_DEVICE void add_values(Scores const& p, Output& out) const {
    auto pair = [&](int j) {
      __half2 const x = __floats2half2_rn(p(j), p(j + 1));
      return reinterpret_cast<uint32_t const&>(x);
    };
    constexpr int kProducts = kMatricesAtOnce / 2;  // of 16 keys
    uint4 a[kProducts];
    if constexpr (kMatrices > 1) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kProducts; ++i) {
        a[i] = {pair(8 * i), kRows > 1 ? pair(8 * i + 2) : 0, pair(8 * i + 4),
                kRows > 1 ? pair(8 * i + 6) : 0};
      }
    } else {
      a[0] = {pair(0), kRows > 1 ? pair(2) : 0, 0, 0};
    }
    uint32_t const lanes_row = lanes_place();
    CUTLASS_PRAGMA_UNROLL
    for (int chunk = 0; chunk < kChunks; chunk += kChunksAtOnce) {
      uint32_t bytes[kMatricesAtOnce];
      begin_chunk(chunk);
      sm90::load_matrices_transposed(bytes, place_of_chunk(lanes_row, chunk));
      uint2 halves[kMatricesAtOnce];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kMatricesAtOnce; ++i) {
        if constexpr (kWithoutNan) bytes[i] = without_nan(bytes[i]);
        halves[i] = halves_of<kInt8, true>(bytes[i]);
      }
      auto even = [&](int i) -> float (&)[4] {
        return *reinterpret_cast<float (*)[4]>(&out(8 * (chunk + i)));
      };
      auto odd = [&](int i) -> float (&)[4] {
        return *reinterpret_cast<float (*)[4]>(&out(8 * (chunk + i) + 4));
      };
      if constexpr (kMatrices > 1) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kProducts; ++i) {
          sm90::multiply_add(even(0), a[i], halves[2 * i].x, halves[2 * i + 1].x);
          sm90::multiply_add(odd(0), a[i], halves[2 * i].y, halves[2 * i + 1].y);
        }
      } else {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kChunksAtOnce; ++i) {
          sm90::multiply_add(even(i), uint2{a[0].x, a[0].y}, halves[i].x);
          sm90::multiply_add(odd(i), uint2{a[0].x, a[0].y}, halves[i].y);
        }
      }
    }
  }

  /// Whether there is a NaN among values. By a whole warp.
  CUTLASS_DEVICE bool has_nan() const {
    uint32_t nan = 0;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = 0; i < kChunks * kChunk / 4; i += kChunksAtOnce) {
      nan |= nan_at(row_ + lane() % kKeys, 4 * (i + lane() / kKeys));
    }
    return __any_sync(0xffffffff, nan != 0);
  }
  /// Bit 8 j: whether the j-th of the thread's columns of a chunk of O is NaN in a row of the
  /// slice.
  CUTLASS_DEVICE uint32_t nan_of(int row, int chunk) const {
    return nan_at(row_ + row, chunk * kChunk + first_output_column());
  }

 private:
  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }

  /// The compiler moves no load across: where O takes most registers it would have spilled for
  /// having all of them at once.
  CUTLASS_DEVICE static void begin_chunk(int chunk) {
    if (!Traits::kQueriesInRegisters && chunk % 4 == 0) __syncwarp();
  }

  CUTLASS_DEVICE static int offset(int row, int column) {
    return cute::as_position_independent_swizzle_layout(typename Traits::LayoutRows{})(row, column);
  }
  CUTLASS_DEVICE uint32_t place(int row, int column) const {
    return cute::cast_smem_ptr_to_uint(block_) + offset(row, column);
  }
  /// Where the row is that this lane knows of what ldmatrix takes at a time.
  CUTLASS_DEVICE uint32_t lanes_place() const {
    uint32_t const first = place(row_ + lane() % kKeys, 0);
    return kMatrices > 1 ? first : place_of_chunk(first, lane() / kKeys);
  }
  /// The swizzle exchanges chunks: what stands in the first one's place, with all that it changes.
  CUTLASS_DEVICE static uint32_t place_of_chunk(uint32_t first, int chunk) {
    constexpr int kTogether = Traits::kSwizzleBytes / kChunk;
    constexpr int kFurther = Traits::kTileN * Traits::kSwizzleBytes;
    return (first ^ (chunk % kTogether * kChunk)) + chunk / kTogether * kFurther;
  }
  CUTLASS_DEVICE uint32_t nan_at(int row, int column) const {
    return nan_of_e4m3(*reinterpret_cast<uint32_t const*>(block_ + offset(row, column)));
  }

  uint8_t const* block_;
  int row_;
};

}  // namespace cute_kernels::attention
