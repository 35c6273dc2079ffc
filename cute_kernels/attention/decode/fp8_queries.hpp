#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/fp8_convert.hpp"
#include "cute_kernels/attention/decode/fp8_traits.hpp"
#include "cute_kernels/fp8/hadamard.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::attention {

/// The queries of a consumer warp as float16, which it reads itself: rotated if the keys are, and
/// each row times a power of two that makes its largest element nearly float16's largest. So
/// nothing of bfloat16's range overflows, and what is lost is less than 2^-28 of the largest.
template <class Traits>
class Fp8Queries {
  using Walk = WorkWalk<Traits>;
  using SharedStorage = typename Traits::SharedStorage;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kRows = Traits::Part::kRows;
  static constexpr int kVector = 8;
  static constexpr int kLanesOfRow = Traits::kHeadDim / kVector;
  static constexpr int kRowsAtOnce = kLanes / kLanesOfRow;
  static constexpr int kPasses = kRows / kRowsAtOnce;
  static constexpr int kPassesAtOnce = 4;  // whose loads are on their way together
  static_assert(kPasses % kPassesAtOnce == 0);

 public:
  CUTLASS_DEVICE Fp8Queries(CachedCall const& call, CacheSource const& source,
                            EightBits const& format)
      : call_(call), source_(source), format_(format) {}

  /// By a whole warp, which has rows of the tile from `first_row` on; rows behind the tile's last
  /// one become 0. `unit`: what the sequence's products of numbers are multiplied by.
  CUTLASS_DEVICE void load(Walk const& walk, int warp, int first_row, float unit,
                           SharedStorage& shared) const {
    int const rows = walk.tile().rows - first_row;
    auto* const words = reinterpret_cast<uint32_t*>(shared.q[warp]);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int pass = 0; pass < kPasses; pass += kPassesAtOnce) {
      uint4 raw[kPassesAtOnce];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPassesAtOnce; ++i) {
        int const row = row_of(pass + i);
        raw[i] = row < rows && column() < call_.head_dim ? raw_row(walk, first_row + row) : uint4{};
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPassesAtOnce; ++i) {
        int const row = row_of(pass + i);
        uint32_t halves[kVector / 2] = {};
        float unit_of_row = 0.f;
        if ((pass + i) * kRowsAtOnce < rows) unit_of_row = halves_of_row(raw[i], halves);
        store(halves, row, words);
        if (column() == 0) shared.query_unit[warp][row] = unit_of_row * unit;
      }
    }
    __syncwarp();
  }

 private:
  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int column() { return lane() % kLanesOfRow * kVector; }
  CUTLASS_DEVICE static int row_of(int pass) { return pass * kRowsAtOnce + lane() / kLanesOfRow; }

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
      uint2 const low = halves_of<false>(bytes.x), high = halves_of<false>(bytes.y);
      return {low.x, low.y, high.x, high.y};
    }
    auto const* const data = static_cast<uint16_t const*>(source_.q.data);
    return __ldg(reinterpret_cast<uint4 const*>(data + offset));
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

  /// As A operands. Of a chunk's columns a lane of the product has four that follow one another, as
  /// it has of a row of K: the first two in the operand's first half, the others in the second.
  CUTLASS_DEVICE static void store(uint32_t const (&halves)[kVector / 2], int row,
                                   uint32_t* words) {
    int const chunk = column() / Traits::kChunk;
    int const first_lane = row % 8 * 4 + column() % Traits::kChunk / 4;
    uint32_t* const to = words + (chunk * kLanes + first_lane) * 4 + row / 8;
    to[0] = halves[0], to[2] = halves[1];
    to[4] = halves[2], to[6] = halves[3];
  }

  CachedCall const& call_;
  CacheSource const& source_;
  EightBits const& format_;
};

}  // namespace cute_kernels::attention
