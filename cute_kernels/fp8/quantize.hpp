#pragma once

#include <cstdint>
#include <type_traits>

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/sm90/math.hpp"

// What the kernels that quantise have in common. Their arithmetic is that of
// python/cute_kernels/fp8, to the bit.
namespace cute_kernels::fp8 {

inline constexpr float kSaturation = 0x1p48f;        // scores of saturated inputs are still finite
inline constexpr float kSmallestMaximum = 0x1p-60f;  // scales and their inverses are finite

template <class Element>
inline constexpr float kLargest = 448.f;
template <>
inline constexpr float kLargest<int8_t> = 127.f;

/// Of kBlockRows rows, each with a scale.
CUTLASS_HOST_DEVICE int blocks_of_rows(int seqlen) { return (seqlen - 1) / kBlockRows + 1; }

/// Clamps to +-kSaturation; NaN stays NaN.
CUTLASS_DEVICE float saturate(float x) {
  return x > kSaturation ? kSaturation : x < -kSaturation ? -kSaturation : x;
}

/// The two elements of a word.
template <class In>
CUTLASS_DEVICE float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<In, cutlass::bfloat16_t>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return __half22float2(reinterpret_cast<__half2 const&>(word));
  }
}

/// Four elements rounded to 8 bits, saturated. NaN stays NaN, or is 0 in int8.
template <class Out>
CUTLASS_DEVICE uint32_t round_to(float a, float b, float c, float d) {
  if constexpr (std::is_same_v<Out, int8_t>) {
    return sm90::round_to_bytes<int8_t>(a, b, c, d);
  } else {
    auto const rounded =
        cutlass::NumericArrayConverter<Out, float, 4>{}(cutlass::Array<float, 4>{a, b, c, d});
    return reinterpret_cast<uint32_t const&>(rounded);
  }
}

/// One of a source's batch entries, or one of its packed sequences.
template <bool kPacked>
class SourceEntry {
 public:
  CUTLASS_DEVICE SourceEntry(Source const& p, int number) : number_(number) {
    if constexpr (kPacked) {
      rows_ = attention::packed_rows(p.cu_seqlens, p.seqused, p.seqlen, number);
    }
  }
  CUTLASS_DEVICE SourceEntry(int number, attention::RowSpan rows) : number_(number), rows_(rows) {}

  CUTLASS_DEVICE int number() const { return number_; }
  CUTLASS_DEVICE int seqlen(Source const& p) const { return kPacked ? rows_.count : p.seqlen; }
  /// Among those of all entries, where these lie one behind the other.
  CUTLASS_DEVICE int64_t first_row(Source const& p) const {
    return kPacked ? rows_.first : static_cast<int64_t>(number_) * p.seqlen;
  }
  CUTLASS_DEVICE int64_t pair(Source const& p, int head) const {
    return static_cast<int64_t>(number_) * p.heads + head;
  }
  /// Its first row of a head.
  template <class In>
  CUTLASS_DEVICE In const* rows(Source const& p, int head) const {
    int64_t const entry = kPacked ? rows_.first * p.in.seqlen_stride : number_ * p.in.batch_stride;
    return static_cast<In const*>(p.in.data) + entry + head * p.in.head_stride;
  }
  /// Its first block, as attention::first_block() counts those of `rows` rows.
  CUTLASS_DEVICE int first_block(int rows) const {
    return attention::first_block(rows_.first, number_, rows);
  }

 private:
  int number_;
  attention::RowSpan rows_;  // if packed
};

/// The packed sequence that has a block of all, of `rows` rows. Of a whole warp, each lane of which
/// looks at another sequence; loads wait for one another no more often than they must. A block that
/// none has may be given to any.
CUTLASS_DEVICE SourceEntry<true> entry_of_block(Source const& p, int block, int rows) {
  constexpr int kLanes = 32;
  constexpr unsigned kAll = 0xffffffff;
  int const lane = threadIdx.x % kLanes;
  int first = 0;
  for (int count = p.batch;;) {
    int const step = (count + kLanes - 1) / kLanes;
    int const entry = first + lane * step;
    bool begins = lane * step < count;
    attention::RowSpan own{};
    if (begins) {
      own = attention::packed_rows(p.cu_seqlens, p.seqused, p.seqlen, entry);
      begins = attention::first_block(own.first, entry, rows) <= block;
    }
    int const last = 31 - __clz(__ballot_sync(kAll, begins || lane == 0));
    first += last * step;
    count = min(step, count - last * step);
    if (step > 1) continue;
    return {first, {__shfl_sync(kAll, own.first, last), __shfl_sync(kAll, own.count, last)}};
  }
}

/// A CTA's block of kRows rows of a source: blockIdx.y and z count blocks and batch entries, or
/// where sequences are packed y the blocks of all.
template <bool kPacked, int kRows>
struct SourceBlock {
  int const of_all;
  SourceEntry<kPacked> const entry;

  CUTLASS_DEVICE explicit SourceBlock(Source const& p)
      : of_all(p.first_block + blockIdx.y), entry(entry_of(p, of_all)) {}

  /// Which one of its entry's blocks.
  CUTLASS_DEVICE int number() const { return kPacked ? of_all - entry.first_block(kRows) : of_all; }
  /// Packed sequences have blocks without a row, too.
  CUTLASS_DEVICE bool is_empty(Source const& p) const {
    return kPacked && (number() < 0 || number() * kRows >= entry.seqlen(p));
  }

 private:
  CUTLASS_DEVICE static SourceEntry<kPacked> entry_of(Source const& p, int block) {
    if constexpr (kPacked) {
      return entry_of_block(p, block, kRows);
    } else {
      return {p, static_cast<int>(p.first_batch + blockIdx.z)};
    }
  }
};

/// How many of a grid's y and z.
inline dim3 blocks_grid(Source const& p, int of_x, int rows) {
  if (p.is_packed()) {
    return dim3(of_x, static_cast<unsigned>(attention::blocks_of_all(p.seqlen, p.batch, rows)));
  }
  return dim3(of_x, (p.seqlen - 1) / rows + 1, p.batch);
}

/// The end of the grid is that of the one before it in its Chain, too: its last CTA waits for it.
CUTLASS_DEVICE void end_after_previous() {
  if (blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1 && blockIdx.z == gridDim.z - 1) {
    cudaGridDependencySynchronize();
  }
}

}  // namespace cute_kernels::fp8
