#pragma once

#include <cstdint>
#include <type_traits>

#include "cute_kernels/fp8/hadamard.hpp"
#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::fp8 {

/// What the threads of a RowBlock have in shared memory. They share the first two, as
/// `write_signs` and its caller leave them.
struct RowBlockStorage {
  uint32_t const* signs;  // 16-byte aligned; in the sign bits of two elements
  // Null, or what is subtracted from each row, with the signs already flipped: first halves of all
  // runs of 8 elements, then second ones, so that lanes find theirs in different banks.
  float const* shift;
  uint32_t* maximum;  // of each warp
};

/// Writes the sign of a channel.
CUTLASS_DEVICE void write_sign(uint32_t* signs, RowTransform const& transform, int channel) {
  uint32_t const sign =
      transform.incoherent ? transform.signs.words[channel / 32] >> (channel % 32) : 0;
  reinterpret_cast<uint16_t*>(signs)[channel] = sign << 15;
}

/// kBlockRows rows of a head, which share a scale, on their way from 16 to 8 bits in the registers
/// of a team of threads, each with kRows rows' share. Team: thread(), sync().
///
/// Instructions are what stands in the way of memory's speed: at 2.5 TB/s an SM may spend 30 on an
/// element. So signs are flipped two elements at a time, the factor 1 / sqrt(d) is left to the
/// scale, and elements that must be saturated or are NaN are looked for once a block: its maximum
/// tells, and then everything is read and done again, with care.
template <class Team, class In, class Out, int kHeadDim, int kRows>
class RowBlock {
 public:
  static constexpr int kLanes = kHeadDim == 256 ? 8 : 4;  // threads of a row
  static constexpr int kChunks = kHeadDim / 8 / kLanes;   // runs of 8 elements of a thread
  static constexpr int kThreads = kBlockRows / kRows * kLanes;
  // No sum of magnitudes up to it passes kSaturation, and the other way round: an element beyond
  // kSaturation leaves a result beyond it, unless the shift is as large.
  static constexpr float kHarmless = 0x1p40f;

  using Raw = uint4[kRows][kChunks];
  using Values = float[kRows][8 * kChunks];

  struct Factors {
    float to_bytes;  // what values are multiplied by before they are rounded
    float scale;     // what the bytes then stand for
  };

  /// `in` is the head's first row. Rows from seqlen on count as 0.
  CUTLASS_DEVICE RowBlock(Team team, void const* in, int64_t row_stride, int first_row, int seqlen,
                          bool incoherent, RowBlockStorage const& storage)
      : team_(team),
        lane_(team.thread() % kLanes),
        in_(static_cast<In const*>(in) + lane_ * 8),
        row_stride_(row_stride),
        first_row_(first_row),
        seqlen_(seqlen),
        incoherent_(incoherent),
        storage_(storage) {}

  CUTLASS_DEVICE void load(Raw& raw) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      auto const* const from = reinterpret_cast<uint4 const*>(in_ + row(i) * row_stride_);
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        raw[i][c] = row(i) < seqlen_ ? __ldcs(from + c * kLanes) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  /// The values to be rounded, and their factors. is_shift_huge: it may pass kHarmless, for one.
  CUTLASS_DEVICE Factors transform(Raw const& raw, Values& x, bool is_shift_huge = false) const {
    float maximum = maximum_of_all(rotated<false>(raw, x));
    bool has_nan = false;
    if (is_shift_huge || !(maximum <= kHarmless)) maximum = transform_with_care(x, has_nan);
    maximum = fmaxf(maximum, kSmallestMaximum);
    // int8 has no NaN: there the scale tells of one, and the elements are 0.
    if (std::is_same_v<Out, int8_t> && has_nan) return {NAN, NAN};
    float const norm = incoherent_ ? kNorm : 1.f;
    return {__fdiv_rn(kLargest<Out>, maximum), __fdiv_rn(__fmul_rn(maximum, norm), kLargest<Out>)};
  }

  /// Calls write(row of the block, channel, 8 bytes) for what the thread has of rows that exist;
  /// kAll: of all.
  template <bool kAll, class Write>
  CUTLASS_DEVICE void round(Values const& x, float to_bytes, Write const& write) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!kAll && row(i) >= seqlen_) continue;
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        float const* const v = &x[i][8 * c];
        uint2 const bytes = make_uint2(
            round_to<Out>(v[0] * to_bytes, v[1] * to_bytes, v[2] * to_bytes, v[3] * to_bytes),
            round_to<Out>(v[4] * to_bytes, v[5] * to_bytes, v[6] * to_bytes, v[7] * to_bytes));
        write(row(i) - first_row_, (c * kLanes + lane_) * 8, bytes);
      }
    }
  }

 private:
  static constexpr float kNorm = kHeadDim == 64    ? 0.125f
                                 : kHeadDim == 256 ? 0.0625f
                                                   : 0.08838834764831845f;

  CUTLASS_DEVICE int row(int i) const {
    return first_row_ + team_.thread() / kLanes + i * (kBlockRows / kRows);
  }

  /// Returns the largest magnitude of the thread's values, NaN if there is one.
  template <bool kSaturate>
  CUTLASS_DEVICE float rotated(Raw const& raw, Values& x) const {
    float maximum = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      int const channel = (c * kLanes + lane_) * 8;
      uint4 const signs = *reinterpret_cast<uint4 const*>(&storage_.signs[channel / 2]);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        uint32_t const words[4] = {raw[i][c].x ^ signs.x, raw[i][c].y ^ signs.y,
                                   raw[i][c].z ^ signs.z, raw[i][c].w ^ signs.w};
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) {
          float2 const pair = unpack<In>(words[j]);
          x[i][8 * c + 2 * j] = kSaturate ? saturate(pair.x) : pair.x;
          x[i][8 * c + 2 * j + 1] = kSaturate ? saturate(pair.y) : pair.y;
        }
      }
      if (storage_.shift != nullptr) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 8; j += 4) {
          float4 const shift =
              *reinterpret_cast<float4 const*>(&storage_.shift[(j / 4 * kHeadDim + channel) / 2]);
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kRows; ++i) {
            if (row(i) >= seqlen_) continue;  // no row: stays 0
            float* const values = &x[i][8 * c + j];
            values[0] -= shift.x;
            values[1] -= shift.y;
            values[2] -= shift.z;
            values[3] -= shift.w;
          }
        }
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (incoherent_) {
        maximum = sm90::max_nan(maximum, hadamard_transform<kLanes, kChunks>(x[i]));
      } else {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 8 * kChunks; ++j) maximum = sm90::max_nan(maximum, fabsf(x[i][j]));
      }
    }
    return maximum;
  }

  /// The values once more, from elements that are saturated; the largest one that is not NaN.
  CUTLASS_DEVICE float transform_with_care(Values& x, bool& has_nan) const {
    Raw raw;
    load(raw);
    rotated<true>(raw, x);
    float maximum = 0.f;
    bool is_nan = false;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 8 * kChunks; ++j) {
        maximum = fmaxf(maximum, fabsf(x[i][j]));
        is_nan |= x[i][j] != x[i][j];
      }
    }
    team_.sync();
    has_nan = maximum_of_all(is_nan ? 1.f : 0.f) > 0.f;
    team_.sync();
    return maximum_of_all(maximum);
  }

  /// The largest of the team, of numbers that are not negative; NaN is larger than all. Between two
  /// calls the team must meet.
  CUTLASS_DEVICE float maximum_of_all(float maximum) const {
    uint32_t bits = __reduce_max_sync(0xffffffff, __float_as_uint(maximum));
    if (team_.thread() % 32 == 0) storage_.maximum[team_.thread() / 32] = bits;
    team_.sync();
    CUTLASS_PRAGMA_UNROLL
    for (int warp = 0; warp < kThreads / 32; ++warp) bits = max(bits, storage_.maximum[warp]);
    return __uint_as_float(bits);
  }

  Team team_;
  int lane_;
  In const* in_;
  int64_t row_stride_;
  int first_row_;
  int seqlen_;
  bool incoherent_;
  RowBlockStorage storage_;
};

}  // namespace cute_kernels::fp8
