#pragma once

#include <type_traits>

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/forward/passes.hpp"
#include "cute_kernels/attention/forward/tile_traits.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/variant/listed_call.hpp"

namespace cute_kernels::attention {

/// Everything about a 16-bit forward kernel that is known when it is compiled.
template <class Tile>
struct ForwardTraits : ForwardTileTraits<Tile, Tile::kAnyCall> {
  using Common = ForwardTileTraits<Tile, Tile::kAnyCall>;
  using Common::kConsumers;
  using Common::kHeadDim;
  using Common::kStages;
  using Common::kTileN;
  using Common::kWarpgroupM;
  using typename Common::Pipeline;

  using Element = typename Tile::Element;
  using ElementQk = Element;
  using Output = Element;
  static constexpr int kHeadDimV = Tile::kHeadDimV;
  static constexpr bool kSeparateOutput = Tile::kSeparateOutput;
  using Variant = typename Tile::Variant;
  using Tiling = std::conditional_t<Variant::kHasBlockMask, ListedTiling<Common::kTileM, kTileN>,
                                    typename Common::Tiling>;
  using Calls = std::conditional_t<Variant::kHasBlockMask, AnyCalls<Tiling::kNeighbours, false>,
                                   typename Common::Calls>;
  // A loader that walks a list needs more registers.
  static constexpr int kOfList = Variant::kHasBlockMask && kConsumers == 2 ? 8 : 0;
  static constexpr int kProducerRegisters = Common::kProducerRegisters + 2 * kOfList;
  static constexpr int kConsumerRegisters = Common::kConsumerRegisters - kOfList;
  static constexpr bool kSumInPairs = Tile::kSumInPairs;  // of P, in OnlineSoftmax
  static constexpr bool kGroupedRows = false;  // a tile's rows are of several heads (PrefillTraits)

  static_assert(kTileN % 16 == 0 && kTileN <= 256, "tile_n is N of Q K^T and K of P V");
  static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0,
                "the 64-byte swizzle is 32 elements wide");
  static_assert(kSeparateOutput || kHeadDimV <= kHeadDim, "O shares Q's memory");

  // WGMMA atoms, one warpgroup wide: S = Q K^T from shared memory, O += P V with P in registers.
  using MmaQk = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kTileN>, cute::Int<kHeadDim>>>()));
  using MmaPv = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kHeadDimV>, cute::Int<kTileN>>,
          cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  using MmaOut = MmaPv;  // whose accumulator is O

  // Shared-memory layouts: 128-byte swizzled, or 64-byte where half a head dim's row would be left
  // over, as TMA writes and WGMMA reads them.
  template <int kColumns>
  using SwizzleOf = std::conditional_t<kColumns % 64 == 0, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                       cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using SwizzleAtom = SwizzleOf<kHeadDim>;
  using SwizzleAtomV = SwizzleOf<kHeadDimV>;
  using LayoutQ = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kHeadDim>>{}));
  using LayoutO = decltype(cute::tile_to_shape(
      SwizzleAtomV{}, cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kHeadDimV>>{}));
  using LayoutK = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using LayoutV = decltype(cute::tile_to_shape(
      SwizzleAtomV{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDimV>, cute::Int<kStages>>{}));
  using LayoutValueLoad = decltype(cute::take<0, 2>(LayoutV{}));
  // V seen as the B operand (head_dim_v, keys): the same memory, transposed by the WGMMA
  // descriptor.
  using LayoutVt = decltype(cute::composition(
      LayoutV{}, cute::make_layout(
                     cute::Shape<cute::Int<kHeadDimV>, cute::Int<kTileN>, cute::Int<kStages>>{},
                     cute::Stride<cute::Int<kTileN>, cute::_1, cute::Int<kTileN * kHeadDimV>>{})));

  // P's range (OnlineSoftmax): up to 2^15 in fp16, whose products with V no accumulator minds; in
  // bf16 never above 1, since V may be as large as a float, and a row's largest at least 2^-40, or
  // 2^-50 with kMargin: V of 1e-20 should still give products that are no denormal numbers. Weights
  // of P may be up to 15 in fp16.
  struct ProbabilityRange {
    static constexpr bool kIsHalf = std::is_same_v<Element, cutlass::half_t>;
    static constexpr float kShift = kIsHalf ? 0.f : 40.f;
    static constexpr float kLargest = !kIsHalf ? 1.f : Variant::kWeighs ? 0x1p12f : 0x1p15f;
    static constexpr float kHuge = kIsHalf ? 0x1p10f : 0x1p14f;
    static constexpr float kMargin = kIsHalf ? 0.f : 10.f;
  };

  // What a block may have, less what barriers take.
  static constexpr int kSharedBytes = 227 * 1024 - 1024;
  static constexpr int kBytesQ = kWarpgroupM * kHeadDim * sizeof(Element);
  static constexpr int kBytesK = kTileN * kHeadDim * sizeof(Element);
  static constexpr int kBytesV = kTileN * kHeadDimV * sizeof(Element);

  // Who tells that Q's memory is free: each warp after its last product with Q, or one thread after
  // O's store.
  static constexpr int kQueryReleases = kSeparateOutput ? cutlass::NumWarpsPerWarpGroup : 1;

  // Memory of its own for each warpgroup's O, or where that does not fit, one that two use in turn.
  static constexpr int kBytesO = kWarpgroupM * kHeadDimV * sizeof(Element);
  static constexpr int kOutputBuffers =
      kStages * (kBytesK + kBytesV) + kConsumers * (kBytesQ + kBytesO) <= kSharedBytes ? kConsumers
                                                                                       : 1;
  static constexpr bool kSharedOutput = kSeparateOutput && kOutputBuffers == 1 && kConsumers > 1;
  static_assert(!kSharedOutput || kConsumers == 2, "each warpgroup's turns are of one parity");

  /// V as TMA reads it: (keys, head_dim_v, heads, batch).
  static auto value_tensor(TensorView const& view, AttentionCall const& call, int keys) {
    return global_tensor<Element>(view, keys, call.sizes.head_dim_v, call.sizes.heads_kv,
                                  tensor_batch(call));
  }

  struct SharedStorage {
    // 1024 bytes is the period of the 128-byte swizzle.
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutK>> k;
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutV>> v;
    struct alignas(1024) QueryBuffer : cute::array<Element, cute::cosize_v<LayoutQ>> {
    } q[kConsumers];
    struct alignas(1024) OutputBuffer : cute::array<Element, cute::cosize_v<LayoutO>> {};
    struct NoOutputBuffer {};
    std::conditional_t<kSeparateOutput, cute::array<OutputBuffer, kOutputBuffers>, NoOutputBuffer>
        o;

    // Full: the producer's TMA bytes have landed. Empty: every consumer warp is done reading.
    typename Pipeline::SharedStorage pipeline_k;
    typename Pipeline::SharedStorage pipeline_v;
    cutlass::arch::ClusterTransactionBarrier q_full[kConsumers];
    // Empty: every warp of warpgroup i has read Q for the last time; where O shares its memory, TMA
    // has read O.
    cutlass::arch::ClusterBarrier q_empty[kConsumers];
    // Shared output buffer: TMA has read the warpgroup's O before.
    cutlass::arch::ClusterBarrier o_empty;
    ForwardPasses passes;
    struct {
      // V's bytes have landed in a stage, not yet looked at.
      cutlass::arch::ClusterTransactionBarrier v_landed[kStages];
    } guard;
  };
};

}  // namespace cute_kernels::attention
