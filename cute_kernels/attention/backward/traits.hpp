#pragma once

#include <algorithm>
#include <type_traits>

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/backward/key_blocks.hpp"
#include "cute_kernels/attention/backward/softmax.hpp"
#include "cute_kernels/attention/backward/statistics.hpp"
#include "cute_kernels/attention/variant/shared_mask.hpp"
#include "cute_kernels/attention/variant/variant.hpp"
#include "cute_kernels/sm90/tma_pipeline.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// Everything about a backward kernel that is known when it is compiled, from one row of
/// tile_configs.toml.
///
/// A CTA keeps kTileN keys and walks over blocks of kTileM queries. The scores stand transposed,
/// S^T = K Q^T, with 64 keys a warpgroup, so that P^T and dS^T leave the accumulators as register
/// operands of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, for dQ = dS K,
/// which sums over all keys and is split over the warpgroups by queries or channels.
///
/// Two ways to split the rest:
/// - by keys (mainloop.hpp): each warpgroup has 64 keys of its own and both their gradients.
/// - by products (split_mainloop.hpp), where the gradients of 64 keys fill the registers of two
///   warpgroups: the first computes S, P and dV, the second dP, dS and dK, of the same keys. Two
///   CTAs with neighbouring keys then exchange dS, and each computes half the channels of dQ for
///   the keys of both: half as much is added in global memory, which binds otherwise.
template <class Tile_>
struct BackwardTraits {
  using Tile = Tile_;
  using Element = typename Tile::Element;

  static constexpr int kHeadDim = Tile::kHeadDim;    // of Q, K and their gradients
  static constexpr int kHeadDimV = Tile::kHeadDimV;  // of V, dO and dV
  static constexpr int kTileM = Tile::kTileM;
  static constexpr int kTileN = Tile::kTileN;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kConsumers = Tile::kConsumerWarpgroups;

  static constexpr int kWarpgroupN = 64;
  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup * (1 + kConsumers);
  static constexpr int kConsumerWarps = kConsumers * cutlass::NumWarpsPerWarpGroup;

  // Registers of a thread after setmaxnreg, multiples of 8. A block's pool is what it starts with.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * kLaunchRegisters);

  static constexpr bool kSplitProducts = Tile::kSplitProducts;
  static_assert(kConsumers == 2, "beside the loader, a warp for the dQ of each, and one for turns");
  static_assert(kTileN == (kSplitProducts ? kWarpgroupN : kWarpgroupN * kConsumers),
                "warpgroups share 64 keys, or each has 64 of its own");
  static_assert(kTileM % 16 == 0 && kTileM <= 256, "tile_m is N of S^T and K of dV");
  static_assert(kHeadDim % 32 == 0 && kHeadDimV % 32 == 0, "TMA loads rows of 64 bytes or more");

  // One kernel takes the dense calls whose masks have one end (Mask), another every call: windows
  // and diagonals of one's own, packed sequences.
  static constexpr bool kAnyCall = Tile::kAnyCall;
  struct Nothing {};
  using CallOfSequences = std::conditional_t<kAnyCall, AttentionCall, Nothing>;
  using Masks = std::conditional_t<kAnyCall, AttentionCall, Mask>;
  using KeyBlock = std::conditional_t<kAnyCall, SequenceKeyBlock, KeyBlockCoord>;

  static constexpr int kCluster = kSplitProducts ? 2 : 1;  // CTAs that compute dQ together
  // CTAs stay and take one key block after the other: the next one's keys and queries load while
  // the gradients of the last one leave.
  static constexpr bool kPersistent = !kSplitProducts;
  /// Of the CTA with this key block, in its cluster.
  CUTLASS_DEVICE static int rank(int n_block) { return n_block % kCluster; }
  // dQ = dS K: each warpgroup has 64 queries, or all 64 and some of the channels, or the same
  // transposed, dQ^T = K^T dS^T.
  static constexpr int kDqSlices = kConsumers * kCluster;
  enum class DqSplit { kQueries, kChannels, kChannelsTransposed };
  static constexpr DqSplit kDqSplit = kTileM == 64 * kDqSlices ? DqSplit::kQueries
                                      : kTileM == 64           ? DqSplit::kChannels
                                                               : DqSplit::kChannelsTransposed;
  static constexpr bool kDqTransposed = kDqSplit == DqSplit::kChannelsTransposed;
  static constexpr int kDqChannels =
      kDqSplit == DqSplit::kQueries ? kHeadDim : kHeadDim / kDqSlices;
  static constexpr int kDqQueries = kDqSplit == DqSplit::kQueries ? 64 : kTileM;
  static constexpr int kSliceM = kDqTransposed ? kDqChannels : kDqQueries;
  static constexpr int kSliceN = kDqTransposed ? kDqQueries : kDqChannels;
  static_assert(kDqSplit == DqSplit::kQueries || kDqChannels * kDqSlices == kHeadDim);
  static_assert(kSliceM % 64 == 0 && kSliceN % 8 == 0);
  static_assert(kDqChannels % 16 == 0, "a slice begins with a swizzled row of K");

  template <int kM, int kN, int kK>
  using MnkShape = cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<kK>>;
  // WGMMA atoms, one warpgroup wide. S^T and dP^T come from shared memory, dV and dK have P^T and
  // dS^T in registers.
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, MnkShape<kWarpgroupN, kTileM, 16>>()));
  template <int kChannels>
  using MmaOfGradient = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, MnkShape<kWarpgroupN, kChannels, kTileM>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  using MmaDk = MmaOfGradient<kHeadDim>;
  using MmaDv = MmaOfGradient<kHeadDimV>;
  static constexpr auto kMajorDqA = kDqTransposed ? cute::GMMA::Major::MN : cute::GMMA::Major::K;
  static constexpr auto kMajorDqB = kDqTransposed ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  using MmaDq = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, MnkShape<kSliceM, kSliceN, kTileN>,
                                 kMajorDqA, kMajorDqB>()));

  // What binds is shared memory, which WGMMA reads its operands from. So many blocks of 16 channels
  // of K and of V are S^T's and dP^T's operand from registers instead.
  static constexpr int kKeyBlocksInRegisters = Tile::kKeyBlocksInRegisters;
  static constexpr int kValueBlocksInRegisters = Tile::kValueBlocksInRegisters;
  using MmaScoresOfRegisters = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, MnkShape<kWarpgroupN, kTileM, 16>>()));

  // A variant that changes scores needs S as it is, before lse is subtracted: the threads do that;
  // and where it weighs P, dP before delta is. What only hides keys is one more mask.
  using Variant = typename Tile::Variant;
  static constexpr bool kChanges = Variant::kScores || Variant::kWeighs;
  // lse and delta are subtracted by WGMMA; or, where no registers are left for its operand of ones,
  // by the threads.
  static constexpr bool kStatisticsByProduct = Tile::kStatisticsByProduct;
  using Statistics = std::conditional_t<kStatisticsByProduct, StatisticParts<kTileM, kChanges>,
                                        StatisticValues<kTileM>>;
  using MmaStatistic = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<cutlass::bfloat16_t, cutlass::bfloat16_t, float,
                                 MnkShape<kWarpgroupN, kTileM, 16>>()));
  // What a mask hook shows all heads is asked before.
  static constexpr bool kSharesMask = !kSplitProducts && shares_mask<Variant>();
  static_assert(!kChanges || kStatisticsByProduct, "in parts, which threads add up");
  static_assert(!(kChanges || Variant::kHides) || kAnyCall, "hooks are told of sequences");
  static constexpr bool is_by_product(Statistic statistic) {
    return kStatisticsByProduct && !(kChanges && statistic == Statistic::kLse) &&
           !(Variant::kWeighs && statistic == Statistic::kDelta);
  }
  // Split by products: S^T and dP^T of the next step are issued before this step's dQ.
  static constexpr bool kScoresAhead = Tile::kScoresAhead;
  static_assert(!kScoresAhead || (kSplitProducts && !kChanges), "registers are left there alone");
  static_assert(!kScoresAhead || !Variant::kHides, "its mainloop asks no hooks");
  // S^T is issued while the last step's dK is in flight.
  static constexpr bool kScoresBehindDk = Tile::kScoresBehindDk;
  static_assert(!kScoresBehindDk || !kSplitProducts, "no warpgroup has both S^T and dK");
  // The longer a step, the fewer a CTA has, and the more each that it waits in order for costs.
  static constexpr bool kLongSteps = kTileM > 64;

  // S^T's and dP^T's accumulators, 16-bit, as the A operand of dV and dK.
  using ScoresAsOperand =
      decltype(sm90::accumulator_as_operand_a(cute::make_layout(cute::partition_shape_C(
          MmaScores{}, cute::Shape<cute::Int<kWarpgroupN>, cute::Int<kTileM>>{}))));

  // Shared-memory layouts, as TMA writes and WGMMA reads them: with the widest swizzle whose rows
  // divide what a product takes.
  static constexpr int swizzled_columns(int columns) {
    return columns % 64 == 0 ? 64 : columns % 32 == 0 ? 32 : 16;
  }
  template <int kColumns>
  using SwizzleOf =
      std::conditional_t<kColumns == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                         std::conditional_t<kColumns == 32, cute::GMMA::Layout_K_SW64_Atom<Element>,
                                            cute::GMMA::Layout_K_SW32_Atom<Element>>>;
  template <int kRows, int kChannels, int kColumns = swizzled_columns(kChannels)>
  using LayoutOfRows = decltype(cute::tile_to_shape(
      SwizzleOf<kColumns>{}, cute::Shape<cute::Int<kRows>, cute::Int<kChannels>>{}));
  template <int kChannels>
  using LayoutOfStages = decltype(cute::tile_to_shape(
      SwizzleOf<swizzled_columns(kChannels)>{},
      cute::Shape<cute::Int<kTileM>, cute::Int<kChannels>, cute::Int<kStages>>{}));
  // The same memory seen transposed, which WGMMA's descriptor undoes.
  template <class Layout, int kRows, int kChannels>
  using Transposed = decltype(cute::composition(
      Layout{}, cute::make_layout(cute::Shape<cute::Int<kChannels>, cute::Int<kRows>>{},
                                  cute::Stride<cute::Int<kRows>, cute::_1>{})));
  template <int kChannels>
  using TransposedStages = decltype(cute::composition(
      LayoutOfStages<kChannels>{},
      cute::make_layout(
          cute::Shape<cute::Int<kChannels>, cute::Int<kTileM>, cute::Int<kStages>>{},
          cute::Stride<cute::Int<kTileM>, cute::_1, cute::Int<kTileM * kChannels>>{})));

  using LayoutQ = LayoutOfStages<kHeadDim>;
  using LayoutGradOut = LayoutOfStages<kHeadDimV>;
  using LayoutQt = TransposedStages<kHeadDim>;
  using LayoutGradOutT = TransposedStages<kHeadDimV>;
  // Two buffers make one barrier a step enough: who writes the second one knows that everyone has
  // read the first. Split by products, they are for the dS of both CTAs, and with scores ahead, of
  // two steps, beside one for P.
  static constexpr int kDsSteps = kScoresAhead ? 2 : 1;
  static constexpr int kDsBuffers =
      kSplitProducts ? kCluster * kDsSteps + (kScoresAhead ? 1 : 0) : 2;
  using LayoutDs = decltype(cute::tile_to_shape(
      SwizzleOf<64>{}, cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kDsBuffers>>{}));
  // K, of which dQ's product takes a slice's channels.
  static constexpr int kKeyColumns = swizzled_columns(kDqChannels);
  using LayoutK = LayoutOfRows<kTileN, kHeadDim, kKeyColumns>;
  using LayoutKt = Transposed<LayoutK, kTileN, kHeadDim>;
  // The other CTA's keys in this one's half of the channels.
  static constexpr int kPeerChannels = kHeadDim / kCluster;
  using LayoutPeerK = LayoutOfRows<kTileN, kPeerChannels, kKeyColumns>;
  using LayoutPeerKt = Transposed<LayoutPeerK, kTileN, kPeerChannels>;
  // 64 keys that a warpgroup has for itself: its V, and dK and dV on their way out.
  static constexpr int kValueColumns = swizzled_columns(kHeadDimV);
  using LayoutV = LayoutOfRows<kWarpgroupN, kHeadDimV>;
  using LayoutDv = LayoutV;
  using LayoutDk = LayoutOfRows<kWarpgroupN, kHeadDim>;

  static constexpr int kBytesDs = kTileM * kTileN * sizeof(Element);
  static constexpr int kBytesQ = kTileM * kHeadDim * sizeof(Element);
  static constexpr int kBytesGradOut = kTileM * kHeadDimV * sizeof(Element);
  // dQ of a step and a warpgroup, in the order of its accumulators (float4 j of thread t at
  // 128 j + t): free of bank conflicts, one piece for TMA, and put right by postprocess.
  static constexpr int kSliceFloats = kTileM * kHeadDim / kDqSlices;
  static constexpr int kDqBuffers = kSplitProducts ? kStages : 1;
  static_assert(!kSplitProducts || kSliceFloats * sizeof(float) <= std::min(kBytesQ, kBytesGradOut),
                "split by products, dQ leaves through the memory of Q and dO");
  static_assert(kSplitProducts ||
                    kSliceFloats * sizeof(float) >= cute::cosize_v<LayoutDk> * sizeof(Element),
                "dK leaves through the memory of dQ");

  // One arrival a warp; where dQ leaves through the stages, the threads that add it release them.
  static constexpr int kStageReleases = kSplitProducts ? 1 : kConsumerWarps;
  static constexpr int kDsWriters = kSplitProducts ? cutlass::NumWarpsPerWarpGroup : kConsumerWarps;

  using Pipeline = sm90::TmaPipeline<kStages>;
  using PipelineState = typename Pipeline::PipelineState;

  struct SharedStorage {
    // 1024 bytes is the period of the 128-byte swizzle.
    // Split by products, dK and dV leave from where K and V were.
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutK>> k;
    alignas(1024) Element v[kTileN / kWarpgroupN][cute::cosize_v<LayoutV>];
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutQ>> q;
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutGradOut>> grad_out;
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutDs>> ds;
    struct WayOut {
      alignas(1024) float dq[kConsumers][kSliceFloats];  // and when all dQ has left, dK
      alignas(1024) Element dv[kConsumers][cute::cosize_v<LayoutDv>];
    };
    struct alignas(1024) PeerKeys : cute::array<Element, cute::cosize_v<LayoutPeerK>> {};
    std::conditional_t<kSplitProducts, PeerKeys, WayOut> own;
    alignas(128) Statistics statistics[kStages];
    // Careful: of each warp, two bits for each of its keys that was not finite; whether it has
    // cleared queries of this key block.
    uint32_t spoilt_keys[kConsumerWarps];
    bool queries_cleared[kConsumerWarps];

    // Full: the producer's TMA bytes have landed. Empty: every consumer warp is done reading.
    typename Pipeline::SharedStorage pipeline_q;  // Q and the statistics
    typename Pipeline::SharedStorage pipeline_grad_out;
    cutlass::arch::ClusterTransactionBarrier k_full;
    cutlass::arch::ClusterTransactionBarrier v_full;
    // Persistent. Every consumer warp is done with K and V.
    cutlass::arch::ClusterBarrier keys_empty;
    // The number of the CTA's next key block is there; everyone has read it.
    int number;
    cutlass::arch::ClusterBarrier number_full;
    cutlass::arch::ClusterBarrier number_empty;
    // Every warp has written its part of dS.
    cutlass::arch::ClusterBarrier ds_full[2];
    // Split by products. The first warpgroup has written P; the other CTA's keys, its dS have
    // landed; every consumer warp of both CTAs has read both dS.
    cutlass::arch::ClusterBarrier p_full;
    cutlass::arch::ClusterTransactionBarrier peer_k_full;
    cutlass::arch::ClusterTransactionBarrier peer_ds_full[kDsSteps];
    cutlass::arch::ClusterBarrier ds_empty[kDsSteps];
    // Full: the warps of warpgroup i have written its slice of dQ, or dK. Empty: TMA has read it
    // (split by products, the pipelines' empty says so).
    cutlass::arch::ClusterBarrier dq_full[kConsumers][kDqBuffers];
    cutlass::arch::ClusterBarrier dq_empty[kConsumers];
    cutlass::arch::ClusterBarrier dv_full[kConsumers];  // the same of dV, read before dK
    // dQ in order: how many of warpgroup i's slices of dQ are complete in global memory.
    int dq_added[kConsumers];
    // What the loader has found, for everyone.
    std::conditional_t<kAnyCall, cute::array<SequenceKeyBlock, 2>, Nothing> key_blocks;
  };
};

}  // namespace cute_kernels::attention
