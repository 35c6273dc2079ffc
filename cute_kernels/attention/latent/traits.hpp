#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/deal.hpp"
#include "cute_kernels/attention/decode/ring_stage.hpp"

namespace cute_kernels::attention {

/// Everything about a kernel of latent attention that is known when it is compiled, from one row of
/// tile_configs.toml.
///
/// A row of keys is [latent | rope], of which the latent is the row of V. It lies in shared memory
/// in two parts, each with a half of the latent: a left one, and a right one that has the rope
/// columns behind it. So do queries. A producer warpgroup gathers rows; of two consumer warpgroups
/// each has the half of O that is its half of V's columns, and the scores of every other block.
template <class Tile>
struct LatentTraits {
  using Element = typename Tile::Element;
  static constexpr bool kEightBits = false;
  static constexpr bool kByWarps = false;
  static constexpr int kHeads = 1;                  // key heads of a tile
  static constexpr int kHeadDim = Tile::kHeadDimV;  // of O and of V
  static constexpr int kRopeDim = Tile::kHeadDim;   // of the rest of a key
  static constexpr int kConsumers = Tile::kConsumerWarpgroups;
  static constexpr int kWarpgroupM = 64;
  static constexpr int kTileRows = kWarpgroupM;  // both warpgroups have the same
  static constexpr int kTileN = Tile::kTileN;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kCtas = 1;
  static constexpr int kThreads = (1 + kConsumers) * cutlass::NumThreadsPerWarpGroup;

  static_assert(kStages == 2 && kConsumers == 2, "a stage's scores are one warpgroup's");
  static constexpr int kLeft = kHeadDim / kConsumers;  // columns of the left part
  static constexpr int kRight = kLeft + kRopeDim;
  static_assert(kLeft == 256 && kRopeDim == 64, "the lanes of a warp share rows evenly");
  static_assert(kTileN == 64, "a lane finds one of its warp's rows, of keys as of queries");
  static constexpr int kLookAhead = 1;  // blocks whose rows are looked up before they are copied

  // Registers of a thread after setmaxnreg, of 504 for three.
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;

  // WGMMA atoms: S = Q K^T, and half of O += P V with a warpgroup's own P in registers, or the
  // other one's in shared memory.
  using MmaQk = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kTileN>, cute::Int<kLeft>>>()));
  using ShapePv = cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kLeft>, cute::Int<kTileN>>;
  using MmaOwnPv = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, ShapePv, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>()));
  using MmaOtherPv = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, ShapePv, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>()));

  static constexpr int kSwizzleBytes = 128;  // of a row
  using SwizzleAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  // 64 rows of Q or of K, or 64 keys of P.
  template <int kColumns>
  using LayoutRows = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kColumns>>{}));
  using LayoutValues = LayoutRows<kLeft>;
  // A half of V seen as the B operand (columns, keys): the same memory, transposed by the WGMMA
  // descriptor.
  using LayoutVt = decltype(cute::composition(
      LayoutValues{}, cute::make_layout(cute::Shape<cute::Int<kLeft>, cute::Int<kTileN>>{},
                                        cute::Stride<cute::Int<kTileN>, cute::_1>{})));

  using Dealer = WorkDealer<LatentTraits>;

  template <int kColumns>
  struct alignas(1024) Rows : cute::array<Element, kTileN * kColumns> {};

  struct SharedStorage {
    using Barrier = cutlass::arch::ClusterBarrier;

    Rows<kLeft> left[kStages];
    Rows<kRight> right[kStages];
    Rows<kLeft> q_left;
    Rows<kRight> q_right;
    Rows<kTileN> p;  // of the newest block: its writer is the reader of the one before

    // With P: the rows' maxima up to its block, and what sums before it are multiplied by.
    float most[kTileRows];
    float factor[kTileRows];
    float sums[kConsumers][kTileRows];  // of each warpgroup's blocks of a part

    // Full: what every producer thread has gathered has landed. Empty: every warp of the consumer
    // warpgroup that reads its values has read it for the last time.
    Barrier left_full[kStages];
    Barrier left_empty[kStages];
    Barrier right_full[kStages];
    Barrier right_empty[kStages];
    Barrier q_full;
    Barrier q_empty;
    Barrier p_full[kConsumers];  // a warpgroup's P, written by all its threads
    typename Dealer::Shared deal;
    // Of a warpgroup's values, behind the last block in which some were cleared; as each of its
    // threads knows it.
    uint32_t cleared[kConsumers];
    int is_last;  // whether all parts of the consumers' item are there
  };
};

}  // namespace cute_kernels::attention
