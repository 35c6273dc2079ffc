#pragma once

#include <type_traits>

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/forward/fp8_calls.hpp"
#include "cute_kernels/attention/forward/passes.hpp"
#include "cute_kernels/attention/forward/tile_traits.hpp"
#include "cute_kernels/attention/global_tensor.hpp"

namespace cute_kernels::attention {

/// The order in which the transposed V holds its keys: position p of a run of 16 holds key
/// value_key_order(p). An accumulator thread has the columns 2c, 2c+1, 8+2c, 8+2c+1 of 16 (c =
/// lane % 4), the A operand of an 8-bit WGMMA wants 4c to 4c+3 there. Keys are summed over, so that
/// moving V's keys spares moving P between threads.
CUTLASS_HOST_DEVICE constexpr int value_key_order(int position) {
  return position % 4 / 2 * 8 + position / 4 * 2 + position % 2;
}

/// Everything about an FP8 forward kernel that is known when it is compiled: 8-bit operands, all
/// K-major, so that V comes transposed.
template <class Tile>
struct Fp8ForwardTraits : ForwardTileTraits<Tile, Tile::kAnyCall> {
  using Common = ForwardTileTraits<Tile, Tile::kAnyCall>;
  using Common::kAnyCall;
  using Common::kConsumers;
  using Common::kHeadDim;
  using Common::kOverlap;
  using Common::kStages;
  using Common::kTileM;
  using Common::kTileN;
  using Common::kWarpgroupM;
  using typename Common::Pipeline;

  using ElementQk = typename Tile::ElementQk;  // e4m3 or int8
  using ElementPv = cutlass::float_e4m3_t;
  using Output = cutlass::bfloat16_t;  // or, decided at run time, the bits of fp16
  static constexpr bool kIntegerScores = std::is_same_v<ElementQk, int8_t>;
  using Score = std::conditional_t<kIntegerScores, int32_t, float>;

  // What int8 products are added to: as bits, a float whose last bit is 1, so that n + kMagicBits
  // is kMagic + n for |n| < 2^22.
  static constexpr float kMagic = 0x1.8p23f;
  static constexpr int32_t kMagicBits = 0x4B400000;
  // Of four groups of products how many are set by moves, the others by loads. At head dim 128
  // three warpgroups' loads alone keep shared memory's port busy for a third of a step.
  static constexpr int kMovesOfFour = Tile::kMovesOfFour;

  using Tiling = NumberedQueryTiling<kTileM, kTileN>;
  using Calls =
      std::conditional_t<kAnyCall, Fp8AnyCalls<Tiling::kNeighbours>, Fp8DenseCalls<kTileM>>;

  static constexpr int kHeadDimV = Tile::kHeadDimV;
  static constexpr bool kSeparateOutput = true;
  static constexpr bool kSharedOutput = false;
  static constexpr int kScaleGroups = kTileN / kScaleRows;
  // See ScaledSoftmax. Row sums of P then come from the tensor cores: 8 more channels of V, all
  // ones.
  static constexpr bool kLinearExp = Tile::kLinearExp;
  static constexpr int kSumChannels = kLinearExp ? 8 : 0;
  static constexpr int kValueChannels = kHeadDimV + kSumChannels;

  static_assert(kTileN % kScaleRows == 0 && kTileN <= 256, "a block is whole blocks of scales");
  static_assert(!kAnyCall || kPackedValueKeys % kTileN == 0, "no block meets two sequences' V");
  static_assert(kHeadDim % 64 == 0 && kHeadDimV % 64 == 0);
  static_assert(kWarpgroupM == kScaleRows, "a warpgroup's queries share a scale");

  using MmaQk = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          ElementQk, ElementQk, Score,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kTileN>, cute::Int<kHeadDim>>>()));
  template <int kChannels>
  using ValueMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<
          ElementPv, ElementPv, float,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kChannels>, cute::Int<kTileN>>>()));
  using MmaPv = ValueMma<kValueChannels>;
  using MmaOut = ValueMma<kHeadDimV>;  // whose accumulator is O, without the row sums
  // 8-bit WGMMAs add up in about 14 bits, of which long sums of one sign are lost. Blocks whose P V
  // they add up all the same, before fp32 takes the sums; 0: all.
  static constexpr int kPromoteEvery = Tile::kPromoteEvery;
  // Several blocks' stay in their accumulators: see Fp8Sums. A single block's P V starts from 0,
  // some channels at a time, in registers that scores leave free.
  static constexpr bool kPromoteSeveral = kPromoteEvery > 1;
  static constexpr bool kPromoteEach = kPromoteEvery == 1;
  static constexpr int kSliceChannels = 64;
  static constexpr int kSlices = kHeadDimV / kSliceChannels;
  template <int kSlice>
  using SliceMma = ValueMma<kSliceChannels + (kSlice + 1 == kSlices ? kSumChannels : 0)>;
  static_assert(!kPromoteEach || kTileN == 64 || kTileN == 128, "a slice is one swizzled column");
  static_assert(!kPromoteEach || !kOverlap, "scores' registers are free only between two blocks");

  // The widest swizzle that the contiguous dimension fills.
  template <class Element, int kWidth>
  using SwizzleAtom = std::conditional_t<kWidth * sizeof(Element) % 128 == 0,
                                         cute::GMMA::Layout_K_SW128_Atom<Element>,
                                         cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using LayoutQ =
      decltype(cute::tile_to_shape(SwizzleAtom<ElementQk, kHeadDim>{},
                                   cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kHeadDim>>{}));
  using LayoutK = decltype(cute::tile_to_shape(
      SwizzleAtom<ElementQk, kHeadDim>{},
      cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using LayoutV = decltype(cute::tile_to_shape(
      SwizzleAtom<ElementPv, kTileN>{},
      cute::Shape<cute::Int<kValueChannels>, cute::Int<kTileN>, cute::Int<kStages>>{}));
  static_assert(!kLinearExp || !kOverlap, "registers do not suffice: ptxas serialises the WGMMAs");
  static_assert(!kLinearExp || kTileN == 64 || kTileN == 128,
                "the ones follow V's channels in one swizzled column");
  // Of a stage some channels, seen from the first of them.
  template <int kChannels>
  using LayoutSlice = decltype(cute::tile_to_shape(
      SwizzleAtom<ElementPv, kTileN>{}, cute::Shape<cute::Int<kChannels>, cute::Int<kTileN>>{}));
  using LayoutValueLoad = LayoutSlice<kHeadDimV>;
  using LayoutO =
      decltype(cute::tile_to_shape(SwizzleAtom<Output, kHeadDimV>{},
                                   cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kHeadDimV>>{}));

  static constexpr int kBytesQ = kWarpgroupM * kHeadDim;
  static constexpr int kBytesK = kTileN * kHeadDim;
  static constexpr int kBytesV = kTileN * kHeadDimV;
  static constexpr int kQueryReleases = cutlass::NumWarpsPerWarpGroup;

  /// V as TMA reads it: (head_dim_v, keys, heads, batch).
  static auto value_tensor(TensorView const& view, AttentionCall const& call, int keys) {
    int padded_keys = (keys + 15) / 16 * 16;
    if (call.is_packed()) {  // a descriptor of no keys is not allowed
      int64_t const of_all = packed_value_keys(call.packed.total_k, call.sizes.batch);
      padded_keys = static_cast<int>(of_all > 0 ? of_all : kPackedValueKeys);
    }
    return global_tensor<ElementPv>(view, call.sizes.head_dim_v, padded_keys, call.sizes.heads_kv,
                                    tensor_batch(call));
  }

  struct SharedStorage {
    alignas(1024) cute::array<ElementQk, cute::cosize_v<LayoutK>> k;
    alignas(1024) cute::array<ElementPv, cute::cosize_v<LayoutV>> v;
    struct alignas(1024) QueryBuffer : cute::array<ElementQk, cute::cosize_v<LayoutQ>> {
    } q[kConsumers];
    struct alignas(1024) OutputBuffer : cute::array<Output, cute::cosize_v<LayoutO>> {};
    cute::array<OutputBuffer, kConsumers> o;  // twice as wide as Q
    cute::array_aligned<float, kHeadDimV> v_scale[kConsumers];
    cute::array_aligned<int32_t, 4> magic;  // kMagicBits
    typename Pipeline::SharedStorage pipeline_k;
    typename Pipeline::SharedStorage pipeline_v;
    cutlass::arch::ClusterTransactionBarrier q_full[kConsumers];
    cutlass::arch::ClusterBarrier q_empty[kConsumers];
    ForwardPasses passes;
  };
};

}  // namespace cute_kernels::attention
