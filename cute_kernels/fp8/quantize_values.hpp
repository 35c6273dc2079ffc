#pragma once

#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/quantize.hpp"

namespace cute_kernels::fp8 {

inline constexpr int kValueThreads = 256;
inline constexpr int kValueChannels = 64;  // of an item: 128 bytes of a row of V
inline constexpr int kValueKeys = 256;

/// V to e4m3, transposed. Scales are those of whole channels, so that every element is needed
/// twice: for its channel's maximum, and to be rounded. One launch does both, and the second
/// reading finds in L2 what the first one brought there.
///
/// An item is kValueKeys keys of a slice: kValueChannels channels of a (batch, head) pair. Even
/// CTAs take an item's maxima, odd ones round the item that is `lag` items behind. Items go through
/// the slices of one group in turn, a group after the other: few enough slices to stay in L2. A CTA
/// that rounds waits until all of its slice's maxima are there. Those are of CTAs with lower
/// numbers, which start before it, as CTAs do, and wait for nothing.
struct ValueOrder {
  int slices;        // of all pairs
  int blocks;        // items of a slice
  int group_slices;  // slices whose items alternate
  int lag;           // items of a group or more

  CUTLASS_HOST_DEVICE int items() const { return slices * blocks; }
  CUTLASS_HOST_DEVICE int ctas() const { return 2 * (items() + lag); }

  CUTLASS_DEVICE void locate(int item, int& slice, int& block) const {
    int const first = item / (group_slices * blocks) * group_slices;
    int const width = min(group_slices, slices - first);
    int const rest = item - first * blocks;
    slice = first + rest % width;
    block = rest / width;
  }
};

/// In e4m3 V is only moved: no maxima, no order.
template <class In_>
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
  using Raw = std::conditional_t<kMove, uint2, uint4>;

  union SharedStorage {
    uint32_t turned[kChannels * kPitch];
    uint32_t maximum[kWarps][kChannels / 2];  // of two channels, in 16 bits
  };

  QuantizeValuesProblem const& p;
  SharedStorage& shared;
  float* const factor;  // shared, of every channel
  int slice;
  int block;
  int const slices_of_pair = values_slices(p.head_dim);
  int const pair = slice / slices_of_pair;
  int const first_channel = slice % slices_of_pair * kChannels;
  int const channels = min(kChannels, p.head_dim - first_channel);
  // Here, so that the divisions are not done for every load.
  In const* const in = static_cast<In const*>(p.in.data) + pair / p.heads * p.in.batch_stride +
                       pair % p.heads * p.in.head_stride + first_channel;

  /// Channel i of the slice among all.
  CUTLASS_DEVICE int64_t channel(int i) const {
    return static_cast<int64_t>(pair) * p.head_dim + first_channel + i;
  }

  CUTLASS_DEVICE Raw load(int key, int chunk) const {
    if (key >= p.seqlen || chunk * 8 >= channels) return Raw{};
    return *reinterpret_cast<Raw const*>(in + key * p.in.seqlen_stride + chunk * 8);
  }

  /// The larger magnitudes of two pairs of elements; NaN is passed over.
  CUTLASS_DEVICE static uint32_t max_pairs(uint32_t a, uint32_t b) {
    using Pair =
        std::conditional_t<std::is_same_v<In, cutlass::bfloat16_t>, __nv_bfloat162, __half2>;
    Pair const most =
        __hmax2(reinterpret_cast<Pair const&>(a), __habs2(reinterpret_cast<Pair const&>(b)));
    return reinterpret_cast<uint32_t const&>(most);
  }

  /// The largest magnitudes of the item's channels, into p.maximum.
  CUTLASS_DEVICE void find_maxima() const {
    constexpr int kRowsAtOnce = kValueThreads / kChunks;
    int const chunk = threadIdx.x % kChunks;
    int const first = block * kKeys + threadIdx.x / kChunks;
    Raw raw[kKeys / kRowsAtOnce];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kKeys / kRowsAtOnce; ++i) raw[i] = load(first + i * kRowsAtOnce, chunk);
    uint32_t most[4] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kKeys / kRowsAtOnce; ++i) {
      uint32_t const words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 4; ++j) most[j] = max_pairs(most[j], words[j]);
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
    if (threadIdx.x < channels / 2) {
      uint32_t of_both = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int warp = 0; warp < kWarps; ++warp) {
        of_both = max_pairs(of_both, shared.maximum[warp][threadIdx.x]);
      }
      float2 const maximum = unpack<In>(of_both);
      // Magnitudes are ordered as their bits are.
      int* const to = reinterpret_cast<int*>(p.maximum) + channel(2 * threadIdx.x);
      atomicMax(to, __float_as_int(fminf(maximum.x, kSaturation)));
      atomicMax(to + 1, __float_as_int(fminf(maximum.y, kSaturation)));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&p.progress[slice], 1);
    }
  }

  /// Waits until p.maximum has all of the slice, then leaves the channels' factors in shared
  /// memory.
  CUTLASS_DEVICE void wait_for_factors(int blocks) const {
    if (threadIdx.x == 0) {
      int done;
      do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                     : "=r"(done)
                     : "l"(&p.progress[slice])
                     : "memory");
      } while (done < blocks);
    }
    __syncthreads();
    if (int const i = threadIdx.x; i < channels) {
      float const maximum = fmaxf(__ldcg(p.maximum + channel(i)), kSmallestMaximum);
      factor[i] = __fdiv_rn(kLargest<Out>, maximum);
      if (block == 0) p.scale[channel(i)] = __fdiv_rn(maximum, kLargest<Out>);
    }
    __syncthreads();
  }

  /// Rounds the item's elements, if they are not yet, and turns them: a thread rounds 4 keys that
  /// stand together in the key order, 8 channels at a time, shared memory turns the words.
  CUTLASS_DEVICE void round_and_turn(int blocks) const {
    Raw raw[kTurns][4];
    CUTLASS_PRAGMA_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      int const item = threadIdx.x + turn * kValueThreads;
      int const word = item / kChunks;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        int const key =
            block * kKeys + word / 4 * 16 + attention::value_key_order(word % 4 * 4 + i);
        raw[turn][i] = load(key, item % kChunks);
      }
    }
    if constexpr (!kMove) wait_for_factors(blocks);
    CUTLASS_PRAGMA_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      int const item = threadIdx.x + turn * kValueThreads;
      int const chunk = item % kChunks;
      int const word = item / kChunks;
      uint32_t* const to = &shared.turned[chunk * 8 * kPitch + word];
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
            uint4 const& r = raw[turn][i];
            x[i] = unpack<In>(j == 0 ? r.x : j == 1 ? r.y : j == 2 ? r.z : r.w);
          }
          float2 const f = *reinterpret_cast<float2 const*>(&factor[chunk * 8 + 2 * j]);
          // What is beyond kSaturation saturates here, too: its channel's maximum is kSaturation.
          to[2 * j * kPitch] =
              round_to<Out>(x[0].x * f.x, x[1].x * f.x, x[2].x * f.x, x[3].x * f.x);
          to[(2 * j + 1) * kPitch] =
              round_to<Out>(x[0].y * f.y, x[1].y * f.y, x[2].y * f.y, x[3].y * f.y);
        }
      }
    }
    __syncthreads();
    int const padded = (p.seqlen + 15) / 16 * 16;
    Out* const out = static_cast<Out*>(p.out) + channel(0) * padded;
    CUTLASS_PRAGMA_UNROLL
    for (int turn = 0; turn < kChannels * kKeys / 16 / kValueThreads; ++turn) {
      int const item = threadIdx.x + turn * kValueThreads;
      int const row = item / (kKeys / 16);
      int const part = item % (kKeys / 16);
      int const key = block * kKeys + part * 16;
      if (row >= channels || key >= padded) continue;
      uint32_t const* const words = &shared.turned[row * kPitch + part * 4];
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * padded + key) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

template <class In>
__global__ void __launch_bounds__(kValueThreads, 5)
    quantize_values_kernel(CUTE_GRID_CONSTANT QuantizeValuesProblem const p,
                           CUTE_GRID_CONSTANT ValueOrder const order) {
  using Kernel = QuantizeValues<In>;
  __shared__ typename Kernel::SharedStorage shared;
  __shared__ float factor[kValueChannels];
  cudaTriggerProgrammaticLaunchCompletion();
  constexpr bool kMove = Kernel::kMove;
  bool const rounds = kMove || blockIdx.x % 2 != 0;
  int const item = kMove ? blockIdx.x : blockIdx.x / 2 - (rounds ? order.lag : 0);
  if (item >= 0 && item < order.items()) {
    int slice, block;
    order.locate(item, slice, block);
    Kernel const kernel{p, shared, factor, slice, block};
    if (rounds) {
      kernel.round_and_turn(order.blocks);
    } else if constexpr (!kMove) {
      kernel.find_maxima();
    }
  }
  end_after_previous();
}

}  // namespace cute_kernels::fp8
