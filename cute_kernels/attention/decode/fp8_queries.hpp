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
  static constexpr int kPassesAtOnce = 4;                   // whose loads are on their way together

  CUTLASS_DEVICE Fp8Queries(CachedCall const& call, CacheSource const& source,
                            EightBits const& format)
      : call_(call), source_(source), format_(format) {}

  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int column() { return lane() % kLanesOfRow * kVector; }

  /// This lane's elements of a row of the tile, as they are.
  CUTLASS_DEVICE uint4 raw_row(Walk const& walk, int row) const {
    int query, head;
    source_.group(query, head, walk.tile().first_row + row);
    int64_t const offset = (int64_t{walk.sequence().row_q} + query) * source_.q.seqlen_stride +
                           (walk.head() * walk.sequence().group + head) * source_.q.head_stride +
                           column();
    if (format_.q_type == QueryType::kE4m3) {
      auto const* const data = static_cast<uint8_t const*>(source_.q.data);
      uint2 const bytes = __ldg(reinterpret_cast<uint2 const*>(data + offset));
      return halves_of_run<false>(bytes);
    }
    auto const* const data = static_cast<uint16_t const*>(source_.q.data);
    return __ldg(reinterpret_cast<uint4 const*>(data + offset));
  }

  /// The same of row `row` of `rows` from `first_row` on; 0 of others, and of columns behind the
  /// last one.
  CUTLASS_DEVICE uint4 raw_row_or_zero(Walk const& walk, int first_row, int row, int rows) const {
    return row < rows && column() < call_.head_dim ? raw_row(walk, first_row + row) : uint4{};
  }

  /// What is stored of a row, and what its elements are multiples of.
  CUTLASS_DEVICE float halves_of_row(uint4 const& raw, uint32_t (&halves)[kVector / 2]) const {
    bool const is_bfloat16 = format_.q_type == QueryType::kBFloat16;
    uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
    float x[kVector];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      float2 const pair = is_bfloat16 ? fp8::unpack<cutlass::bfloat16_t>(words[i])
                                      : fp8::unpack<cutlass::half_t>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
    if (format_.rotated) {
      fp8::flip_signs(x, format_.signs, column());
      fp8::hadamard_transform(x, call_.head_dim / kVector);
    }
    float most = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; ++i) most = fmaxf(most, fabsf(x[i]));
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 1; lanes < kLanesOfRow; lanes *= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
    }
    // 2^n with most 2^n from 2^14 to below 2^15, as far as n and -n are exponents.
    int const exponent = static_cast<int>(__float_as_uint(most) >> 23);
    int const raised = min(max(2 * 127 + 14 - exponent, 1), 253);
    float const factor = __uint_as_float(static_cast<uint32_t>(raised) << 23);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      __half2 const pair = __floats2half2_rn(x[2 * i] * factor, x[2 * i + 1] * factor);
      halves[i] = reinterpret_cast<uint32_t const&>(pair);
    }
    float const unit = __uint_as_float(static_cast<uint32_t>(2 * 127 - raised) << 23);
    // 1 / sqrt(head_dim) makes the rotation orthogonal.
    return format_.rotated ? unit * rsqrtf(static_cast<float>(call_.head_dim)) : unit;
  }

  CachedCall const& call_;
  CacheSource const& source_;
  EightBits const& format_;
};

}  // namespace cute_kernels::attention
