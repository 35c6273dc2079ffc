#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

namespace cute_kernels::attention {

/// Everything about a backward kernel that is known when it is compiled, from one row of
/// tile_configs.toml.
///
/// A CTA keeps kTileN keys and walks over blocks of kTileM queries. The scores stand transposed,
/// S^T = K Q^T: a consumer warpgroup owns 64 keys, so that P^T and dS^T leave the accumulators as
/// register operands of dV += P^T dO and dK += dS^T Q. Only dS goes through shared memory, for
/// dQ = dS K, which sums over the keys of all warpgroups.
template <class Tile_>
struct BackwardTraits {
  using Tile = Tile_;
  using Element = typename Tile::Element;

  static constexpr int kHeadDim = Tile::kHeadDim;
  static constexpr int kTileM = Tile::kTileM;
  static constexpr int kTileN = Tile::kTileN;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kConsumers = Tile::kConsumerWarpgroups;

  static constexpr int kWarpgroupN = 64;
  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup * (1 + kConsumers);
  static constexpr int kConsumerWarps = kConsumers * cutlass::NumWarpsPerWarpGroup;

  // Registers of a thread after setmaxnreg, multiples of 8. A block's pool is what it starts with.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * kLaunchRegisters);

  static_assert(kConsumers == 2 || kConsumers == 3);
  static_assert(kTileN == kWarpgroupN * kConsumers, "a warpgroup owns 64 keys");
  static_assert(kTileM % 16 == 0 && kTileM <= 256, "tile_m is N of S^T and K of dV");
  static_assert(kHeadDim % 64 == 0, "the 128-byte swizzle is 64 elements wide");

  // dQ = dS K is split over the warpgroups by queries where each gets 64 of them; otherwise
  // dQ^T = K^T dS^T is split by channels.
  static constexpr bool kSplitQueries = kTileM == 64 * kConsumers;
  static constexpr int kSliceM = kSplitQueries ? 64 : kHeadDim / kConsumers;
  static constexpr int kSliceN = kSplitQueries ? kHeadDim : kTileM;
  static_assert(kSliceM % 64 == 0 && (kSplitQueries || kSliceM * kConsumers == kHeadDim));

  template <int kM, int kN, int kK>
  using MnkShape = cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<kK>>;
  // WGMMA atoms, one warpgroup wide. S^T and dP^T come from shared memory, dV and dK have P^T and
  // dS^T in registers.
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 MnkShape<kWarpgroupN, kTileM, kHeadDim>>()));
  using MmaDkv = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, MnkShape<kWarpgroupN, kHeadDim, kTileM>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  static constexpr auto kMajorDqA = kSplitQueries ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  static constexpr auto kMajorDqB = kSplitQueries ? cute::GMMA::Major::MN : cute::GMMA::Major::K;
  using MmaDq = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, MnkShape<kSliceM, kSliceN, kTileN>,
                                 kMajorDqA, kMajorDqB>()));

  // Shared-memory layouts: 128-byte swizzled, as TMA writes and WGMMA reads them.
  using SwizzleAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  using LayoutK = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>>{}));
  using LayoutQ = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  // Two buffers, so that one barrier a step is enough: who writes the second one knows that
  // everyone has read the first.
  static constexpr int kDsBuffers = 2;
  using LayoutDs = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kDsBuffers>>{}));
  // The same memory seen transposed, which WGMMA's descriptor and STSM undo.
  using LayoutKt = decltype(cute::composition(
      LayoutK{}, cute::make_layout(cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>>{},
                                   cute::Stride<cute::Int<kTileN>, cute::_1>{})));
  using LayoutQt = decltype(cute::composition(
      LayoutQ{}, cute::make_layout(
                     cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileM>, cute::Int<kStages>>{},
                     cute::Stride<cute::Int<kTileM>, cute::_1, cute::Int<kTileM * kHeadDim>>{})));
  using LayoutDst = decltype(cute::composition(
      LayoutDs{},
      cute::make_layout(cute::Shape<cute::Int<kTileN>, cute::Int<kTileM>, cute::Int<kDsBuffers>>{},
                        cute::Stride<cute::Int<kTileM>, cute::_1, cute::Int<kTileM * kTileN>>{})));

  static constexpr int kBytesK = kTileN * kHeadDim * sizeof(Element);
  static constexpr int kBytesQ = kTileM * kHeadDim * sizeof(Element);
  static constexpr int kBytesRows = kTileM * sizeof(float);
  // dQ of a step and a warpgroup, in the order of its accumulators (float4 j of thread t at
  // 128 j + t): free of bank conflicts, one piece for TMA, and put right by postprocess.
  static constexpr int kSliceFloats = kTileM * kHeadDim / kConsumers;

  using Pipeline = cutlass::PipelineTmaAsync<kStages>;
  using PipelineState = typename Pipeline::PipelineState;

  struct SharedStorage {
    // 1024 bytes is the period of the 128-byte swizzle.
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutK>> k;  // then dK
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutK>> v;  // then dV
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutQ>> q;
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutQ>> grad_out;
    alignas(1024) cute::array<Element, cute::cosize_v<LayoutDs>> ds;
    alignas(128) float dq[kConsumers][kSliceFloats];
    alignas(16) float lse_log2[kStages][kTileM];
    alignas(16) float delta[kStages][kTileM];

    // Full: the producer's TMA bytes have landed. Empty: every consumer warp is done reading.
    typename Pipeline::SharedStorage pipeline_q;         // Q and lse
    typename Pipeline::SharedStorage pipeline_grad_out;  // dO and delta
    cutlass::arch::ClusterTransactionBarrier k_full;
    cutlass::arch::ClusterTransactionBarrier v_full;
    // Every consumer warp has written its part of dS.
    cutlass::arch::ClusterBarrier ds_full[kDsBuffers];
    // Full: the warps of warpgroup i have written its slice of dQ. Empty: TMA has read it.
    cutlass::arch::ClusterBarrier dq_full[kConsumers];
    cutlass::arch::ClusterBarrier dq_empty[kConsumers];
  };
};

}  // namespace cute_kernels::attention
