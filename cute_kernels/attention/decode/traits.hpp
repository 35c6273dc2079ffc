#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/deal.hpp"
#include "cute_kernels/attention/decode/ring_stage.hpp"
#include "cute_kernels/attention/decode/softmax.hpp"
#include "cute_kernels/attention/decode/warp_walk.hpp"

namespace cute_kernels::attention {

/// Everything about a kernel that attends to a cache that is known when it is compiled, from one
/// row of tile_configs.toml: a producer warpgroup that gathers rows, one or two consumer warpgroups
/// with 64 rows each, or in turn with all 64. Where producers convert a CTA has four warpgroups.
/// Where a tile has two key heads, side by side, each warpgroup has the rows of one of them.
template <class Tile, bool kConverts_ = false>
struct DecodeTraits {
  using Element = typename Tile::Element;
  using CacheElement = Element;
  static constexpr bool kEightBits = false;  // of a number of the cache
  static constexpr bool kByWarps = false;    // consumers that multiply, or warpgroups
  // Producers make numbers float16.
  static constexpr bool kConverts = kConverts_;
  struct Format {};                                // what its type does not say
  static constexpr int kHeadDim = Tile::kHeadDim;  // of K and of V
  static constexpr int kConsumers = Tile::kConsumerWarpgroups;
  static constexpr int kHeads = Tile::kHeads;  // key heads of a tile
  static constexpr int kWarpgroupM = 64;
  static constexpr int kTileRows = kWarpgroupM * kConsumers / kHeads;  // of each
  static constexpr int kTileN = Tile::kTileN;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kCtas = Tile::kCtas;  // of a multiprocessor, at a time
  static constexpr int kProducers = kConverts ? 4 - kConsumers : 1;  // come first
  static constexpr int kThreads = (kProducers + kConsumers) * cutlass::NumThreadsPerWarpGroup;
  // What completes a full barrier of K or of V.
  static constexpr int kArrivalsOfFull = cutlass::NumThreadsPerWarpGroup;

  static_assert(kConsumers * kCtas <= 3);
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256,
                "the lanes of a warp share rows of 16-byte pieces evenly");
  static_assert(kTileN % 32 == 0 && kTileN <= 128, "a lane finds one of its warp's rows");
  static_assert(kStages >= kConsumers, "warpgroups take turns with the stages");
  static_assert(kHeads == 1 || kHeads == kConsumers, "a head is a warpgroup's");
  static constexpr int kColumns = kHeads * kHeadDim;  // of a row of the tile's keys

  // Whether each consumer warp's walk over the CTA's parts lies in shared memory: scores of 128
  // keys, or O of 256 columns, leave no registers for it. Where producers convert theirs do, too.
  static constexpr bool kWalksInMemory = kConverts || kTileN == 128 || kHeadDim == 256;
  static constexpr int kWalks = !kWalksInMemory ? 0
                                : kConverts     ? kThreads / cutlass::NumThreadsPerWarp
                                                : kConsumers * cutlass::NumWarpsPerWarpGroup;

  static constexpr int kLookAhead = 2;  // blocks whose rows are looked up before they are copied

  // Registers of a thread after setmaxnreg, of what a multiprocessor has: with two CTAs 256 for two
  // threads, with two consumer warpgroups 504 for three.
  static constexpr bool kReconfigureRegisters = kConsumers * kCtas >= 2;
  // A producer thread knows more of two heads, and consumers have half as many scores.
  static constexpr int kProducerRegisters = kHeads == 2 ? 104 : kConsumers == 2 ? 88 : 72;
  static constexpr int kConsumerRegisters = kHeads == 2 ? 200 : kConsumers == 2 ? 208 : 184;

  // WGMMA atoms: S = Q K^T from shared memory, O += P V with P in registers.
  using MmaQk = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kTileN>, cute::Int<kHeadDim>>>()));
  // ptxas wants the registers of one instruction to be less than a thread begins with.
  static constexpr int kColumnsAtOnce = kThreads > 384 && kHeadDim > 128 ? 128 : kHeadDim;
  using MmaPv = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kColumnsAtOnce>, cute::Int<kTileN>>,
          cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  static constexpr int kSwizzleBytes = 128;  // of a row
  using SwizzleAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  using LayoutQ = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kHeadDim>>{}));
  // Of a plane, a head's rows of one stage, of K as of V.
  using LayoutRows = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>>{}));
  static constexpr int kPlaneElements = kTileN * kHeadDim;
  static constexpr int kStageElements = kHeads * kPlaneElements;
  // The planes of a stage follow one another: two of 64 columns lie as one of 128 would.
  static constexpr int kPlanes = kHeads * kStages;
  using LayoutK = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kPlanes>>{}));
  // V seen as the B operand (head_dim, keys): the same memory, transposed by the WGMMA descriptor.
  using LayoutVt = decltype(cute::composition(
      LayoutK{},
      cute::make_layout(cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>, cute::Int<kPlanes>>{},
                        cute::Stride<cute::Int<kTileN>, cute::_1, cute::Int<kPlaneElements>>{})));
  // What the producer fills: a stage, and the queries of all heads.
  using LayoutStage = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kColumns>>{}));
  using LayoutQueries = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kColumns>>{}));
  static_assert(kHeads == 1 || kHeadDim * sizeof(Element) == kSwizzleBytes);

  using Dealer = WorkDealer<DecodeTraits>;

  struct SharedStorage {
    using Barrier = cutlass::arch::ClusterBarrier;

    // 1024 bytes is the period of the 128-byte swizzle.
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutK>> k;
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutK>> v;
    struct alignas(1024) QueryBuffer : cute::array<Element, cute::cosize_v<LayoutQ>> {
    } q[kConsumers];

    // Full: what every producer thread has gathered has landed. Empty: every consumer warp has read
    // it for the last time; where warpgroups take turns, one arrives for the others.
    Barrier k_full[kStages];
    Barrier k_empty[kStages];
    Barrier v_full[kStages];
    Barrier v_empty[kStages];
    Barrier q_full;
    Barrier q_empty;
    typename Dealer::Shared deal;
    cute::array<typename WarpWalk<DecodeTraits>::Memory, kWalks> walks;  // over the CTA's parts
    RowStatistics statistics[kConsumers][kWarpgroupM];  // of each warpgroup's blocks of a part
    int is_last;  // whether all parts of the consumers' item are there
  };
};

}  // namespace cute_kernels::attention
