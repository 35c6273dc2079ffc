#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/fp8_convert.hpp"
#include "cute_kernels/attention/decode/fp8_traits.hpp"
#include "cute_kernels/fp8/hadamard.hpp"
#include "cute_kernels/fp8/quantize.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// The queries of a consumer warpgroup as float16, which it reads itself: rotated if the keys are,
/// and each row times a power of two that makes its largest element nearly float16's largest. So
/// nothing of bfloat16's range overflows, and what is lost is less than 2^-28 of the largest.
template <class Traits>
class Fp8Queries {
  using Walk = WorkWalk<Traits>;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
  static constexpr int kVector = 8;
  static constexpr int kLanesOfRow = Traits::kHeadDim / kVector;
  static constexpr int kRowsOfWarp = kLanes / kLanesOfRow;  // at a time
  static constexpr int kPasses = Traits::kWarpgroupM / (kRowsOfWarp * kWarps);
  static constexpr int kPassesAtOnce = 4;  // whose loads are on their way together
  static_assert(kPasses % kPassesAtOnce == 0);

 public:
  CUTLASS_DEVICE Fp8Queries(CachedCall const& call, CacheSource const& source,
                            EightBits const& format)
      : call_(call), source_(source), format_(format) {}

  /// By a whole warpgroup, number `warpgroup`, which has rows of the tile from `first_row` on.
  /// `unit`: what the sequence's products of numbers are multiplied by.
  CUTLASS_DEVICE void load(Walk const& walk, int warpgroup, int first_row, float unit,
                           typename Traits::SharedStorage& shared) const {
    int const rows = min(Traits::kWarpgroupM, walk.tile().rows - first_row);
    // Other warps' products with the rows of the part before have ended, too.
    sm90::barrier_sync(sm90::NamedBarrier::kQueriesWritten, warpgroup, kThreads);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int pass = 0; pass < kPasses && row_of(pass, 0) < rows; pass += kPassesAtOnce) {
      uint4 raw[kPassesAtOnce];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPassesAtOnce; ++i) {
        int const row = row_of(pass + i, part());
        raw[i] = row < rows && column() < call_.head_dim ? raw_row(walk, first_row + row) : uint4{};
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPassesAtOnce; ++i) {
        if (row_of(pass + i, 0) >= rows) break;  // the whole warp
        int const row = row_of(pass + i, part());
        float const unit_of_row = store_row(raw[i], shared.q[warpgroup].data(), row);
        if (column() == 0) shared.query_unit[warpgroup][row] = unit_of_row * unit;
      }
    }
    cutlass::arch::fence_view_async_shared();
    sm90::barrier_sync(sm90::NamedBarrier::kQueriesWritten, warpgroup, kThreads);
  }

 private:
  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int part() { return lane() / kLanesOfRow; }
  CUTLASS_DEVICE static int column() { return lane() % kLanesOfRow * kVector; }
  CUTLASS_DEVICE static int row_of(int pass, int part) {
    return (pass * kWarps + threadIdx.x / kLanes % kWarps) * kRowsOfWarp + part;
  }

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
      return halves_of<false>(bytes);
    }
    auto const* const data = static_cast<uint16_t const*>(source_.q.data);
    return __ldg(reinterpret_cast<uint4 const*>(data + offset));
  }

  /// Writes a row, and returns what its elements are multiples of.
  CUTLASS_DEVICE float store_row(uint4 const& raw, cutlass::half_t* to, int row) const {
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
    uint32_t halves[4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      __half2 const pair = __floats2half2_rn(x[2 * i] * factor, x[2 * i + 1] * factor);
      halves[i] = reinterpret_cast<uint32_t const&>(pair);
    }
    auto const layout = cute::as_position_independent_swizzle_layout(typename Traits::LayoutQ{});
    *reinterpret_cast<uint4*>(to + layout(row, column())) = {halves[0], halves[1], halves[2],
                                                             halves[3]};
    float const unit = __uint_as_float(static_cast<uint32_t>(2 * 127 - raised) << 23);
    // 1 / sqrt(head_dim) makes the rotation orthogonal.
    return format_.rotated ? unit * rsqrtf(static_cast<float>(call_.head_dim)) : unit;
  }

  CachedCall const& call_;
  CacheSource const& source_;
  EightBits const& format_;
};

}  // namespace cute_kernels::attention
