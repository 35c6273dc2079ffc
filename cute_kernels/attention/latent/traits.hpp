#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/deal.hpp"
#include "cute_kernels/attention/decode/ring_stage.hpp"

namespace cute_kernels::attention {

/// Everything about a kernel of latent attention that is known when it is compiled, from one row of
/// tile_configs.toml.
///
/// A row of keys is [latent | rope], of which the latent is the row of V. So is a row of queries. A
/// producer warpgroup brings rows to shared memory; of two consumer warpgroups each has the half of
/// O that is its half of V's columns, and the scores of every other block.
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
  static constexpr int kProducers = 1;
  static constexpr int kThreads = (kProducers + kConsumers) * cutlass::NumThreadsPerWarpGroup;

  static_assert(kStages == 2 && kConsumers == 2, "a stage's scores are one warpgroup's");
  static constexpr int kHalf = kHeadDim / kConsumers;  // columns of O of a warpgroup
  static constexpr int kKeyColumns = kHeadDim + kRopeDim;
  static constexpr int kChunk = 64;  // columns that lie together, a row of the swizzle each
  static_assert(kHalf == 256 && kRopeDim == kChunk, "P takes the rope columns' place");
  static_assert(kTileN == 64, "of P as many columns; a lane finds one of its warp's rows");
  // Keys land in pieces: scores of a block are begun when its first columns are there, and a piece
  // is free as soon as P has been multiplied by its values.
  static constexpr int kPieces = 4;
  static constexpr int kPiecesOfHalf = kPieces / kConsumers;
  static constexpr int kPiece = kHeadDim / kPieces;
  static constexpr int half_of(int piece) { return piece / kPiecesOfHalf; }
  /// The piece of which the rope columns are. P takes their place: it is free again when the half
  /// is of the warpgroup that reads P, not of the stage's own.
  static constexpr int piece_of_ropes(int stage) {
    return kPiecesOfHalf * (kConsumers - stage) - 1;
  }
  static constexpr int kLookAhead = 1;  // blocks whose rows are looked up before they are copied

  // Registers of a thread after setmaxnreg, of 504 for three.
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;

  // WGMMA atoms: S = Q K^T, and a piece of O += P V with a warpgroup's own P in registers, or the
  // other one's in shared memory.
  using MmaQk = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kTileN>, cute::Int<kPiece>>>()));
  using ShapePv = cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kPiece>, cute::Int<kTileN>>;
  using MmaOwnPv = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, ShapePv, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>()));
  using MmaOtherPv = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, ShapePv, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>()));

  static constexpr int kSwizzleBytes = 128;  // of a row
  using SwizzleAtom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  // Neighbouring columns of 64 rows of Q or of K, or 64 keys of P.
  template <int kColumns>
  using LayoutRows = decltype(cute::tile_to_shape(
      SwizzleAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kColumns>>{}));
  // A piece of V seen as the B operand (columns, keys): the same memory, transposed by the WGMMA
  // descriptor.
  using LayoutVt = decltype(cute::composition(
      LayoutRows<kPiece>{}, cute::make_layout(cute::Shape<cute::Int<kPiece>, cute::Int<kTileN>>{},
                                              cute::Stride<cute::Int<kTileN>, cute::_1>{})));

  using Dealer = WorkDealer<LatentTraits>;

  /// 64 rows of Q or of K, of kChunk columns after kChunk columns.
  struct alignas(1024) Rows : cute::array<Element, kTileN * kKeyColumns> {
    CUTLASS_DEVICE Element* columns_from(int column) { return this->data() + column * kTileN; }
  };

  struct SharedStorage {
    using Barrier = cutlass::arch::ClusterTransactionBarrier;

    // When S of a block is made nobody needs its rope columns any more: P of it takes their place.
    Rows keys[kStages];
    Rows queries;

    // With the newest P: the rows' maxima up to its block, and what sums before it are multiplied
    // by. Their writer is the reader of those before.
    float most[kTileRows];
    float factor[kTileRows];
    float sums[kConsumers][kTileRows];  // of each warpgroup's blocks of a part

    // Full: a piece has landed. Empty: every warp of the warpgroup whose half it is of has read its
    // values, and P, for the last time; in both CTAs of a pair, where this one loads that half.
    Barrier full[kStages][kPieces];
    Barrier empty[kStages][kPieces];
    Barrier q_full;
    Barrier q_empty;
    Barrier p_full[kConsumers];  // a warpgroup's P, written by all its warps
    typename Dealer::Shared deal;
    // Of a warpgroup's values, behind the last block in which some were cleared; as each of its
    // threads knows it.
    uint32_t cleared[kConsumers];
    int is_last;  // whether all parts of the consumers' item are there
  };
};

}  // namespace cute_kernels::attention
