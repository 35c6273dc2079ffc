#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/fp8_convert.hpp"
#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/fp8/hadamard.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::attention {

/// Queries as float16, which consumers read themselves: rotated if the keys are, and each row times
/// a power of two that makes its largest element nearly float16's largest. So nothing of bfloat16's
/// range overflows, and what is lost is less than 2^-28 of the largest.
template <class Traits>
class Fp8Queries {
 protected:
  using Walk = WorkWalk<Traits>;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kVector = 8;
  static constexpr int kLanesOfRow = Traits::kHeadDim / kVector;
  static constexpr int kRowsAtOnce = kLanes / kLanesOfRow;  // of a warp

  CUTLASS_DEVICE Fp8Queries(CachedCall const& call, CacheSource const& source,
                            EightBits const& format)
      : call_(call), source_(source), format_(format) {}

  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int column() { return lane() % kLanesOfRow * kVector; }

  /// This lane's elements of kCount rows of the tile, as they are in memory, numbers of 8 bits in
  /// the first half: nothing waits for one of them before all are on their way. What is not there,
  /// rows behind the tile's last one and columns behind the last one, is read as what is.
  template <int kCount, class RowOf>
  CUTLASS_DEVICE void read_rows(Walk const& walk, RowOf const& row_of, uint4 (&raw)[kCount]) const {
    int64_t place[kCount];
    int const last = walk.tile().rows - 1;
    int const first_head = walk.head() * walk.sequence().group;
    int const own_column = column() < call_.head_dim ? column() : 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      int query, head;
      source_.group(query, head, walk.tile().first_row + min(row_of(i), last));
      place[i] = (int64_t{walk.sequence().row_q} + query) * source_.q.seqlen_stride +
                 (first_head + head) * source_.q.head_stride + own_column;
    }
    // Either type's first half by the same instruction: of two that write one register the second
    // would wait for the first.
    bool const has_8_bits = format_.q_type == QueryType::kE4m3;
    auto const* const data = static_cast<uint8_t const*>(source_.q.data);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      auto const* const from =
          reinterpret_cast<uint2 const*>(data + (has_8_bits ? place[i] : 2 * place[i]));
      uint2 const first = __ldg(from);
      uint2 second{0, 0};
      if (!has_8_bits) second = __ldg(from + 1);
      raw[i] = {first.x, first.y, second.x, second.y};
    }
  }

  /// What is stored of these, 0 of rows from number `rows` on and of columns behind the last one,
  /// and what the rows' elements are multiples of. Rows are converted side by side: each is a chain
  /// of exchanges between lanes.
  template <int kCount, class RowOf>
  CUTLASS_DEVICE void halves_of_rows(uint4 const (&raw)[kCount], RowOf const& row_of, int rows,
                                     uint32_t (&halves)[kCount][kVector / 2],
                                     float (&unit)[kCount]) const {
    bool const is_bfloat16 = format_.q_type == QueryType::kBFloat16;
    bool const has_column = column() < call_.head_dim;
    float x[kCount][kVector];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      uint4 words = raw[i];
      if (format_.q_type == QueryType::kE4m3) {
        words = halves_of_run<false>(uint2{words.x, words.y});
      }
      if (!has_column || row_of(i) >= rows) words = uint4{};
      uint32_t const of_row[4] = {words.x, words.y, words.z, words.w};
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kVector / 2; ++j) {
        float2 const pair = is_bfloat16 ? fp8::unpack<cutlass::bfloat16_t>(of_row[j])
                                        : fp8::unpack<cutlass::half_t>(of_row[j]);
        x[i][2 * j] = pair.x;
        x[i][2 * j + 1] = pair.y;
      }
    }
    if (format_.rotated) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; ++i) {
        fp8::flip_signs(x[i], format_.signs, column());
        fp8::hadamard_transform(x[i], call_.head_dim / kVector);
      }
    }
    float most[kCount] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kVector; ++j) most[i] = fmaxf(most[i], fabsf(x[i][j]));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 1; lanes < kLanesOfRow; lanes *= 2) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; ++i) {
        most[i] = fmaxf(most[i], __shfl_xor_sync(0xffffffff, most[i], lanes));
      }
    }
    // 1 / sqrt(head_dim) makes the rotation orthogonal.
    float const of_rotation = format_.rotated ? rsqrtf(static_cast<float>(call_.head_dim)) : 1.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      // 2^n with most 2^n from 2^14 to below 2^15, as far as n and -n are exponents.
      int const exponent = static_cast<int>(__float_as_uint(most[i]) >> 23);
      int const raised = min(max(2 * 127 + 14 - exponent, 1), 253);
      float const factor = __uint_as_float(static_cast<uint32_t>(raised) << 23);
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kVector / 2; ++j) {
        __half2 const pair = __floats2half2_rn(x[i][2 * j] * factor, x[i][2 * j + 1] * factor);
        halves[i][j] = reinterpret_cast<uint32_t const&>(pair);
      }
      unit[i] = __uint_as_float(static_cast<uint32_t>(2 * 127 - raised) << 23) * of_rotation;
    }
  }

  CachedCall const& call_;
  CacheSource const& source_;
  EightBits const& format_;
};

}  // namespace cute_kernels::attention
