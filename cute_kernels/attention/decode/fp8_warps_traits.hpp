#pragma once

#include <cutlass/half.h>

#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/attention/decode/fp8_warps_part.hpp"
#include "cute_kernels/attention/decode/traits.hpp"

namespace cute_kernels::attention {

/// The kernel for a cache of 8 bits and few rows: consumer warps make its numbers float16 in
/// registers, and products are mma.sync's, of 16 rows. So what one token costs is little, but each
/// 16 rows more convert anew.
template <class Tile_>
struct Fp8WarpsTraits : DecodeTraits<Tile_> {
  using Tile = Tile_;
  using Base = DecodeTraits<Tile>;
  using Base::kHeadDim;
  using Base::kStages;
  using Base::kTileN;
  static constexpr bool kEightBits = true;
  static constexpr bool kByWarps = true;
  using Format = EightBits;
  static_assert(std::is_same_v<typename Base::Element, cutlass::half_t>);
  static_assert(Base::kConsumers == 2 && Base::kCtas == 1);

  static constexpr int kTileRows = Tile::kTileM;
  static constexpr int kWarps = Base::kConsumers * cutlass::NumWarpsPerWarpGroup;
  static constexpr bool kWalksInMemory = true;
  static constexpr int kWalks = kWarps;
  using Part = WarpPart<kWarps, kTileN>;
  // Of parts of so few keys all warps have a share of each: then it is the time of one slice, and
  // of what is not in the instruction cache yet, that counts.
  using FewKeysPart = WarpPart<kWarps, kTileN, 8>;
  static constexpr int kFewBlocks = 2 * kWarps * FewKeysPart::kKeys / kTileN;
  static_assert(kTileRows % Part::kRows == 0 && kTileRows <= kWarps * Part::kRows);
  static_assert(Part::kMostTurns <= kStages && FewKeysPart::kMostTurns <= kStages,
                "warps take turns with the stages");

  // K and V are in shared memory as they are in the cache.
  using CacheElement = uint8_t;
  static constexpr int kSwizzleBytes = kHeadDim < 128 ? kHeadDim : 128;
  using LayoutRows = decltype(cute::tile_to_shape(
      std::conditional_t<kSwizzleBytes == 64, cute::GMMA::Layout_K_SW64_Atom<CacheElement>,
                         cute::GMMA::Layout_K_SW128_Atom<CacheElement>>{},
      cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>>{}));
  using LayoutStage = LayoutRows;

  // 16 columns of keys, values or queries are a chunk: 16 bytes of a row of the cache, and what one
  // product of scores takes.
  static constexpr int kChunk = 16;
  static constexpr int kChunks = kHeadDim / kChunk;
  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  // Queries stay in registers where O leaves room for them.
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128;
  // Queries have memory of their own where there is some. Otherwise they lie where O of the first
  // one of their warps lies at a part's end, and warps meet before and behind that.
  static constexpr bool kQueriesApart = kHeadDim == 128;
  static constexpr int kGroups = kTileRows / Part::kRows;  // of rows

  using Dealer = WorkDealer<Fp8WarpsTraits>;

  struct SharedStorage {
    using Barrier = cutlass::arch::ClusterBarrier;

    alignas(1024) cute::array<CacheElement, kStages * Base::kStageElements> k;
    alignas(1024) cute::array<CacheElement, kStages * Base::kStageElements> v;
    // Queries of 16 rows, each lane's A operands of a chunk's product.
    uint4 q[kQueriesApart ? kGroups : 0][kChunks][kLanes];
    // At a part's end what a warp has of O, of one of a thread's rows.
    float4 out[kWarps][kChunks][kLanes];
    // Of the rows of K and of V in a stage, filled and freed with it.
    float key_factors[kStages][kTileN];
    float value_factors[kStages][kTileN];
    typename WarpWalk<Base>::Memory walks[kWalks];  // of each warp over the CTA's parts
    float query_unit[kGroups][Part::kRows];         // what queries are multiples of
    float value_unit;                               // and values

    // As of DecodeTraits.
    Barrier k_full[kStages];
    Barrier k_empty[kStages];
    Barrier v_full[kStages];
    Barrier v_empty[kStages];
    typename Dealer::Shared deal;
    // Of each warp's keys of a part, and what its O is a multiple of.
    struct alignas(16) OfWarp {
      RowStatistics keys;
      float unit;
    } statistics[kWarps][Part::kRows];
    alignas(8) char parts[kWarps][sizeof(WorkParts)];  // of the warp's item
    int is_last;  // whether all parts of the consumers' item are there
  };

  /// Of the rows from `first_row` on.
  CUTLASS_DEVICE static auto& queries(SharedStorage& shared, int first_row) {
    using Queries = uint4[kChunks][kLanes];
    int const group = first_row / Part::kRows;
    if constexpr (kQueriesApart) {
      return shared.q[group];
    } else {
      return reinterpret_cast<Queries&>(shared.out[group * kWarps / kGroups]);
    }
  }
};

}  // namespace cute_kernels::attention
