#pragma once

#include <cstdint>
#include <type_traits>

#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::fp8 {

inline constexpr int kValueThreads = 256;
inline constexpr int kValueChannels = 64;  // of a CTA: 128 bytes of a row of V
inline constexpr int kValueKeys = 256;

/// Channels of a head that are quantised together: a slice of it.
constexpr int values_slices(int head_dim) {
  return (head_dim + kValueChannels - 1) / kValueChannels;
}

/// V to e4m3, transposed: kValueKeys keys of a slice in turn.
///
/// Scales are those of whole channels, which are not known before all of V was read. To read it
/// once, they are made for what a sample foretells, with headroom (sample.hpp). Where an element is
/// too large all the same, its head is quantised again (quantize_values_again_kernel).
///
/// In e4m3 V is only moved.
/// A packed sequence has whole attention::kPackedValueKeys to itself, zeros behind its last key.
template <class In_, bool kPacked>
struct QuantizeValues {
  using In = In_;
  using Out = cutlass::float_e4m3_t;
  static constexpr bool kMove = std::is_same_v<In, Out>;
  static constexpr int kChannels = kValueChannels;
  static constexpr int kKeys = kValueKeys;
  static constexpr int kChunks = kChannels / 8;
  static constexpr int kWords = kKeys / 4;   // of 4 keys that stand together
  static constexpr int kPitch = kWords + 1;  // spreads a column of words over the banks
  static constexpr int kTurns = kWords * kChunks / kValueThreads;
  static constexpr int kWarps = kValueThreads / 32;
  using Chunk = std::conditional_t<kMove, uint2, uint4>;
  using Raw = Chunk[kTurns][4];

  struct SharedStorage {
    union {
      uint32_t turned[kChannels * kPitch];
      uint32_t maximum[kWarps][kChannels / 2];  // of two channels, in 16 bits
    };
    alignas(16) float factor[kChannels];
  };

  QuantizeValuesProblem const& p;
  SharedStorage& shared;
  int const head;
  SourceEntry<kPacked> const entry;
  int const first_channel;
  int const channels = min(kChannels, p.head_dim - first_channel);
  int const chunk = threadIdx.x % kChunks;
  In const* const in = entry.template rows<In>(p, head) + first_channel + chunk * 8;

  /// `slice` counts through the heads.
  CUTLASS_DEVICE QuantizeValues(QuantizeValuesProblem const& problem, SharedStorage& storage,
                                int slice, SourceEntry<kPacked> const& entry)
      : p(problem),
        shared(storage),
        head(slice / values_slices(problem.head_dim)),
        entry(entry),
        first_channel(slice % values_slices(problem.head_dim) * kChannels) {}

  CUTLASS_DEVICE int64_t pair() const { return entry.pair(p, head); }
  CUTLASS_DEVICE int64_t channel(int i) const { return pair() * p.head_dim + first_channel + i; }

  /// The 4 keys that a thread rounds to a word, which it writes at `word`.
  CUTLASS_DEVICE static int word(int turn) {
    return (threadIdx.x + turn * kValueThreads) / kChunks;
  }

  CUTLASS_DEVICE void load(int block, Raw& raw) const {
    CUTLASS_PRAGMA_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        int const key = block * kKeys + word(turn) / 4 * 16 +
                        attention::value_key_order(word(turn) % 4 * 4 + i);
        bool const is_there = key < entry.seqlen(p) && chunk * 8 < channels;
        raw[turn][i] = is_there
                           ? __ldcs(reinterpret_cast<Chunk const*>(in + key * p.in.seqlen_stride))
                           : Chunk{};
      }
    }
  }

  /// A channel's factor, to shared memory, and its scale, if `stores`, from the largest magnitude.
  CUTLASS_DEVICE void set_scale(int i, float largest, bool stores = true) const {
    float const maximum = fminf(fmaxf(largest, kSmallestMaximum), kSaturation);
    shared.factor[i] = __fdiv_rn(kLargest<Out>, maximum);
    if (stores) p.scale[channel(i)] = __fdiv_rn(maximum, kLargest<Out>);
  }

  CUTLASS_DEVICE void set_scales_of_sample(bool stores) const {
    if (int const i = threadIdx.x; i < channels) {
      set_scale(i, __ldcg(p.maximum + channel(i)), stores);
    } else if (i < kChannels) {
      shared.factor[i] = 0.f;  // of no channel
    }
    __syncthreads();
  }

  /// The larger magnitudes of two pairs of elements; NaN is passed over.
  CUTLASS_DEVICE static uint32_t max_pairs(uint32_t a, uint32_t b) {
    using Pair =
        std::conditional_t<std::is_same_v<In, cutlass::bfloat16_t>, __nv_bfloat162, __half2>;
    Pair const most =
        __hmax2(reinterpret_cast<Pair const&>(a), __habs2(reinterpret_cast<Pair const&>(b)));
    return reinterpret_cast<uint32_t const&>(most);
  }

  /// As set_scales_of_sample(), from all elements of the slice.
  CUTLASS_DEVICE void set_scales_of_all(int blocks) const {
    uint32_t most[4] = {};
    for (int block = 0; block < blocks; ++block) {
      Raw raw;
      load(block, raw);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4 * kTurns; ++i) {
        Chunk const& x = raw[i / 4][i % 4];
        uint32_t const words[4] = {x.x, x.y, x.z, x.w};
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) most[j] = max_pairs(most[j], words[j]);
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 16; lanes >= kChunks; lanes /= 2) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 4; ++j) {
        most[j] = max_pairs(most[j], __shfl_xor_sync(0xffffffff, most[j], lanes));
      }
    }
    if (threadIdx.x % 32 < kChunks) {
      *reinterpret_cast<uint4*>(&shared.maximum[threadIdx.x / 32][chunk * 4]) =
          make_uint4(most[0], most[1], most[2], most[3]);
    }
    __syncthreads();
    if (int const i = threadIdx.x; 2 * i < channels) {
      uint32_t of_both = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int warp = 0; warp < kWarps; ++warp) {
        of_both = max_pairs(of_both, shared.maximum[warp][i]);
      }
      float2 const maximum = unpack<In>(of_both);
      set_scale(2 * i, maximum.x);
      set_scale(2 * i + 1, maximum.y);
    }
    __syncthreads();
  }

  /// Rounds the block's elements, if they are not yet, and turns them: a thread rounds 4 keys that
  /// stand together in the key order, 8 channels at a time, shared memory turns the words. Whether
  /// an element of the CTA's became e4m3's largest number or NaN.
  CUTLASS_DEVICE bool round_and_turn(int block, Raw const& raw) const {
    uint32_t overflow = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      uint32_t* const to = &shared.turned[chunk * 8 * kPitch + word(turn)];
      if constexpr (kMove) {
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          uint32_t words[4];
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < 4; ++i) words[i] = half ? raw[turn][i].y : raw[turn][i].x;
          CUTLASS_PRAGMA_UNROLL
          for (int j = 0; j < 4; ++j) {  // byte j of each
            uint32_t const low = __byte_perm(words[0], words[1], j | (4 + j) << 4);
            uint32_t const high = __byte_perm(words[2], words[3], j | (4 + j) << 4);
            to[(4 * half + j) * kPitch] = __byte_perm(low, high, 0x5410);
          }
        }
      } else {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) {
          float2 x[4];
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < 4; ++i) {
            Chunk const& r = raw[turn][i];
            x[i] = unpack<In>(j == 0 ? r.x : j == 1 ? r.y : j == 2 ? r.z : r.w);
          }
          float2 const f = *reinterpret_cast<float2 const*>(&shared.factor[chunk * 8 + 2 * j]);
          uint32_t const words[2] = {
              round_to<Out>(x[0].x * f.x, x[1].x * f.x, x[2].x * f.x, x[3].x * f.x),
              round_to<Out>(x[0].y * f.y, x[1].y * f.y, x[2].y * f.y, x[3].y * f.y)};
          CUTLASS_PRAGMA_UNROLL
          for (int k = 0; k < 2; ++k) {
            to[(2 * j + k) * kPitch] = words[k];
            overflow |= (words[k] & 0x7f7f7f7fu) + 0x02020202u;  // 448 is 0x7e, NaN 0x7f
          }
        }
      }
    }
    bool const overflowed = __syncthreads_or(overflow & 0x80808080u);
    auto whole = [](int keys, int block) { return (keys + block - 1) / block * block; };
    constexpr int kBlock = kPacked ? attention::kPackedValueKeys : 16;
    int const padded = whole(entry.seqlen(p), kBlock);
    int64_t pitch = padded;  // of a channel
    Out* out = static_cast<Out*>(p.out);
    if constexpr (kPacked) {
      pitch = attention::packed_value_keys(p.seqlen, p.batch);
      out += (static_cast<int64_t>(head) * p.head_dim + first_channel) * pitch +
             static_cast<int64_t>(entry.first_block(kBlock)) * kBlock;
    } else {
      out += channel(0) * padded;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int turn = 0; turn < kChannels * kKeys / 16 / kValueThreads; ++turn) {
      int const item = threadIdx.x + turn * kValueThreads;
      int const row = item / (kKeys / 16);
      int const part = item % (kKeys / 16);
      int const key = block * kKeys + part * 16;
      if (row >= channels || key >= padded) continue;
      uint32_t const* const words = &shared.turned[row * kPitch + part * 4];
      *reinterpret_cast<uint4*>(out + row * pitch + key) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    return overflowed;
  }
};

template <class In, bool kPacked>
__global__ void __launch_bounds__(kValueThreads, 5)
    quantize_values_kernel(CUTE_GRID_CONSTANT QuantizeValuesProblem const p) {
  using Kernel = QuantizeValues<In, kPacked>;
  __shared__ typename Kernel::SharedStorage shared;
  cudaTriggerProgrammaticLaunchCompletion();
  SourceBlock<kPacked, kValueKeys> const keys(p);
  int const block = keys.number();
  Kernel const kernel(p, shared, blockIdx.x, keys.entry);
  if (keys.is_empty(p)) return end_after_previous();
  typename Kernel::Raw raw;
  kernel.load(block, raw);  // all loads first
  cudaGridDependencySynchronize();
  if constexpr (!Kernel::kMove) kernel.set_scales_of_sample(block == 0);
  bool const overflowed = kernel.round_and_turn(block, raw);
  if (!Kernel::kMove && overflowed && threadIdx.x == 0) p.overflowed[kernel.pair()] = 1;
}

/// A CTA a slice: where an element of the head was too large, everything again with scales of the
/// largest elements.
template <class In, bool kPacked>
__global__ void __launch_bounds__(kValueThreads)
    quantize_values_again_kernel(CUTE_GRID_CONSTANT QuantizeValuesProblem const p) {
  using Kernel = QuantizeValues<In, kPacked>;
  __shared__ typename Kernel::SharedStorage shared;
  cudaTriggerProgrammaticLaunchCompletion();
  Kernel const kernel(p, shared, blockIdx.x, SourceEntry<kPacked>(p, p.first_batch + blockIdx.z));
  cudaGridDependencySynchronize();
  if (__ldcg(p.overflowed + kernel.pair()) == 0) return;
  int const blocks = (kernel.entry.seqlen(p) + kValueKeys - 1) / kValueKeys;
  kernel.set_scales_of_all(blocks);
  for (int block = 0; block < blocks; ++block) {
    typename Kernel::Raw raw;
    kernel.load(block, raw);
    kernel.round_and_turn(block, raw);
    __syncthreads();  // the next block's words
  }
}

}  // namespace cute_kernels::fp8
