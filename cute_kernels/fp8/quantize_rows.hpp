#pragma once

#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/fp8/hadamard.hpp"
#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::fp8 {

static_assert(kBlockRows == attention::kScaleRows);

/// How the threads of a row share it: kChunks runs of 8 elements each, next to one another in
/// kLanes lanes. The head dim is 8 kLanes kChunks, or with kReflects any multiple of 8 kLanes up to
/// that: what incoherent processing then has beside a Hadamard matrix of 8 kLanes is the reflection
/// that turns those chunks into each other.
template <int kLanes_, int kChunks_, bool kReflects_ = false>
struct RowLayout {
  static constexpr int kLanes = kLanes_;
  static constexpr int kChunks = kChunks_;
  static constexpr bool kReflects = kReflects_;
  static constexpr int kMaxHeadDim = 8 * kLanes * kChunks;
  static constexpr int kRows = kChunks > 4 ? 1 : 2;  // of a thread
};

/// One CTA quantises the kBlockRows rows of a head that share a scale: everything is read once,
/// stays in registers, and is written once. A thread has Layout::kRows rows' share.
///
/// The kernel is to be bound by memory, and instructions are what stands in its way: at 2.5 TB/s an
/// SM may spend 30 on an element. So signs are flipped two elements at a time, the factor 1 /
/// sqrt(d) is left to the scale, and elements that must be saturated or are NaN are looked for once
/// a block: its maximum tells, and then everything is read and done again, with care.
template <class In_, class Out_, class Layout, bool kPacked>
struct QuantizeRows {
  using In = In_;
  using Out = Out_;
  static constexpr int kLanes = Layout::kLanes;
  static constexpr int kChunks = Layout::kChunks;
  static constexpr int kRows = Layout::kRows;
  static constexpr int kMaxHeadDim = Layout::kMaxHeadDim;
  static constexpr int kThreads = kBlockRows / kRows * kLanes;
  // Whose elements registers hold.
  static constexpr int kResidentThreads = attention::greater(kThreads, 2048 / kChunks);
  // Of the Hadamard matrix: 1 / sqrt(n)
  static constexpr int kOrder = Layout::kReflects ? 8 * kLanes : kMaxHeadDim;
  static constexpr float kNorm = kOrder == 16    ? 0.25f
                                 : kOrder == 32  ? 0.17677669529663687f
                                 : kOrder == 64  ? 0.125f
                                 : kOrder == 128 ? 0.08838834764831845f
                                                 : 0.0625f;
  static_assert(kOrder >= 16 && kOrder <= 256);
  // No sum of magnitudes up to it passes kSaturation, and the other way round: an element beyond
  // kSaturation leaves a result beyond it, unless the shift is as large.
  static constexpr float kHarmless = 0x1p40f;

  struct SharedStorage {
    alignas(16) uint32_t signs[kMaxHeadDim / 2];  // in the sign bits of two elements
    // With the signs already flipped; first halves of all runs of 8 elements, then second ones, so
    // that lanes find theirs in different banks.
    alignas(16) float shift[2][kMaxHeadDim / 2];
    uint32_t maximum[kThreads / 32];
  };

  using Raw = uint4[kRows][kChunks];
  using Values = float[kRows][8 * kChunks];

  QuantizeRowsProblem const& p;
  SharedStorage& shared;
  SourceBlock<kPacked, kBlockRows> const block{p};
  int const head = blockIdx.x;
  int const lane = threadIdx.x % kLanes;

  CUTLASS_DEVICE int row(int i) const {
    return block.number() * kBlockRows + threadIdx.x / kLanes + i * (kBlockRows / kRows);
  }
  CUTLASS_DEVICE bool has_row(int i) const { return row(i) < block.entry.seqlen(p); }

  CUTLASS_DEVICE int head_dim() const { return Layout::kReflects ? p.head_dim : kMaxHeadDim; }
  CUTLASS_DEVICE bool has_chunk(int c) const {
    return !Layout::kReflects || c * kLanes * 8 < p.head_dim;
  }

  CUTLASS_DEVICE void load(Raw& raw) const {
    In const* const in = block.entry.template rows<In>(p, head) + lane * 8;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      auto const* const from = reinterpret_cast<uint4 const*>(in + row(i) * p.in.seqlen_stride);
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        raw[i][c] = has_row(i) && has_chunk(c) ? __ldcs(from + c * kLanes) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  /// What is the same for all rows, to shared memory. Whether the shift alone may pass kSaturation.
  CUTLASS_DEVICE bool prepare() const {
    bool is_huge = false;
    auto prepare_channel = [&](uint32_t i) {
      uint32_t const sign = p.incoherent ? p.signs.words[i / 32] >> (i % 32) : 0;
      reinterpret_cast<uint16_t*>(shared.signs)[i] = sign << 15;
      if (p.shift != nullptr) {
        float const shift = __ldcg(p.shift + block.entry.pair(p, head) * head_dim() + i);
        shared.shift[i / 4 % 2][i / 8 * 4 + i % 4] =
            __uint_as_float(__float_as_uint(shift) ^ sign << 31);
        is_huge |= !(fabsf(shift) <= kHarmless);
      }
    };
    if constexpr (!Layout::kReflects) {
      static_assert(kThreads >= kMaxHeadDim || Layout::kReflects);
      if (threadIdx.x < kMaxHeadDim) prepare_channel(threadIdx.x);
    } else {
      for (int i = threadIdx.x; i < p.head_dim; i += kThreads) prepare_channel(i);
    }
    return __syncthreads_or(is_huge);
  }

  /// The values to be rounded. The largest magnitude of the thread's, NaN if there is one.
  template <bool kSaturate>
  CUTLASS_DEVICE float transform(Raw const& raw, Values& x) const {
    float maximum = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if (!has_chunk(c)) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRows; ++i) {
          CUTLASS_PRAGMA_UNROLL
          for (int j = 0; j < 8; ++j) x[i][8 * c + j] = 0.f;
        }
        continue;
      }
      int const channel = (c * kLanes + lane) * 8;
      uint4 const signs = *reinterpret_cast<uint4 const*>(&shared.signs[channel / 2]);
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
      if (p.shift != nullptr) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 8; j += 4) {
          float4 const shift = *reinterpret_cast<float4 const*>(&shared.shift[j / 4][channel / 2]);
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < kRows; ++i) {
            if (!has_row(i)) continue;  // no row: stays 0
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
      if (p.incoherent) {
        if constexpr (Layout::kReflects) {
          int const runs = p.head_dim / (8 * kLanes);
          maximum = sm90::max_nan(maximum, reflected_transform<kLanes, kChunks>(x[i], runs));
        } else {
          maximum = sm90::max_nan(maximum, hadamard_transform<kLanes, kChunks>(x[i]));
        }
      } else {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 8 * kChunks; ++j) maximum = sm90::max_nan(maximum, fabsf(x[i][j]));
      }
    }
    return maximum;
  }

  /// The largest of the CTA, of numbers that are not negative; NaN is larger than all.
  CUTLASS_DEVICE float maximum_of_all(float maximum) const {
    uint32_t bits = __reduce_max_sync(0xffffffff, __float_as_uint(maximum));
    if (threadIdx.x % 32 == 0) shared.maximum[threadIdx.x / 32] = bits;
    __syncthreads();
    CUTLASS_PRAGMA_UNROLL
    for (int warp = 0; warp < kThreads / 32; ++warp) bits = max(bits, shared.maximum[warp]);
    return __uint_as_float(bits);
  }

  /// The values once more, from elements that are saturated; the largest one that is not NaN.
  CUTLASS_DEVICE float transform_with_care(Values& x, bool& has_nan) const {
    Raw raw;
    load(raw);
    transform<true>(raw, x);
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
    has_nan = __syncthreads_or(is_nan);
    return maximum_of_all(maximum);
  }

  CUTLASS_DEVICE void store(Values const& x, float factor) const {
    Out* const out = static_cast<Out*>(p.out) + head * head_dim() + lane * 8;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!has_row(i)) continue;
      int64_t const number = (block.entry.first_row(p) + row(i)) * p.heads;
      auto* const to = reinterpret_cast<uint2*>(out + number * head_dim());
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        if (!has_chunk(c)) continue;
        float const* const v = &x[i][8 * c];
        to[c * kLanes] =
            make_uint2(round_to<Out>(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor),
                       round_to<Out>(v[4] * factor, v[5] * factor, v[6] * factor, v[7] * factor));
      }
    }
  }

  /// Where the block's scale stands.
  CUTLASS_DEVICE int64_t scale_index() const {
    if constexpr (kPacked) {
      return head * attention::blocks_of_all(p.seqlen, p.batch, kBlockRows) + block.of_all;
    } else {
      return block.entry.pair(p, head) * blocks_of_rows(p.seqlen) + block.number();
    }
  }

  CUTLASS_DEVICE void run() const {
    if (block.is_empty(p)) return;
    Raw raw;
    load(raw);  // all loads first: they are what the kernel's time is made of
    if (p.shift != nullptr) cudaGridDependencySynchronize();
    bool const is_shift_huge = prepare();
    Values x;
    float maximum = maximum_of_all(transform<false>(raw, x));
    bool has_nan = false;
    if (is_shift_huge || !(maximum <= kHarmless)) maximum = transform_with_care(x, has_nan);
    maximum = fmaxf(maximum, kSmallestMaximum);
    // int8 has no NaN: there the scale tells of one, and the elements are 0.
    bool const lost = std::is_same_v<Out, int8_t> && has_nan;
    if (threadIdx.x == 0) {
      float const norm = p.incoherent ? kNorm : 1.f;
      p.scale[scale_index()] = lost ? NAN : __fdiv_rn(__fmul_rn(maximum, norm), kLargest<Out>);
    }
    store(x, lost ? NAN : __fdiv_rn(kLargest<Out>, maximum));
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kResidentThreads / Kernel::kThreads)
    quantize_rows_kernel(CUTE_GRID_CONSTANT QuantizeRowsProblem const p) {
  __shared__ typename Kernel::SharedStorage shared;
  cudaTriggerProgrammaticLaunchCompletion();
  Kernel{p, shared}.run();
  end_after_previous();
}

}  // namespace cute_kernels::fp8
