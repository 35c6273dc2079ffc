#pragma once

#include <cutlass/half.h>

#include "cute_kernels/attention/decode/fp8_part.hpp"
#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/attention/decode/traits.hpp"

namespace cute_kernels::attention {

/// A kernel of a row of tile_configs.toml that attends to a cache of 8 bits, e4m3 or int8. All of
/// these numbers are float16 numbers too: consumer warps make them that in registers, and the
/// products are mma.sync's of float16, for queries of any type.
template <class Tile_>
struct Fp8DecodeTraits : DecodeTraits<Tile_> {
  using Tile = Tile_;
  using Base = DecodeTraits<Tile>;
  using Base::kHeadDim;
  using Base::kStages;
  using Base::kTileN;
  static constexpr bool kEightBits = true;
  using Format = EightBits;
  static_assert(std::is_same_v<typename Base::Element, cutlass::half_t>);
  static_assert(Base::kConsumers == 2 && Base::kCtas == 1);

  static constexpr int kWarps = Base::kConsumers * cutlass::NumWarpsPerWarpGroup;
  using Part = WarpPart<kWarps, kTileN>;
  static_assert(Part::kMostTurns <= kStages, "warps take turns with the stages");

  // K and V are in shared memory as they are in the cache.
  using CacheElement = uint8_t;
  static constexpr int kSwizzleBytes = kHeadDim < 128 ? kHeadDim : 128;
  using LayoutRows = decltype(cute::tile_to_shape(
      std::conditional_t<kSwizzleBytes == 64, cute::GMMA::Layout_K_SW64_Atom<CacheElement>,
                         cute::GMMA::Layout_K_SW128_Atom<CacheElement>>{},
      cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>>{}));

  // 16 columns of keys, values or queries are a chunk: 16 bytes of a row of the cache, and what one
  // product of scores takes.
  static constexpr int kChunk = 16;
  static constexpr int kChunks = kHeadDim / kChunk;
  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  // Queries stay in registers where O leaves room for them.
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128;

  struct SharedStorage {
    using Barrier = cutlass::arch::ClusterBarrier;

    alignas(1024) cute::array<CacheElement, kStages * Base::kStageElements> k;
    alignas(1024) cute::array<CacheElement, kStages * Base::kStageElements> v;
    // A warp's own: its queries, each lane's A operands of a chunk's product; at a part's end O.
    uint4 q[kWarps][kChunks][kLanes];
    // Of the rows of K and of V in a stage, filled and freed with it.
    float key_factors[kStages][kTileN];
    float value_factors[kStages][kTileN];
    alignas(8) char walks[kWarps][sizeof(WorkWalk<Base>)];  // of each warp over the CTA's parts
    float query_unit[kWarps][Part::kRows];                  // what queries are multiples of

    // As of DecodeTraits.
    Barrier k_full[kStages];
    Barrier k_empty[kStages];
    Barrier v_full[kStages];
    Barrier v_empty[kStages];
    typename Base::Dealer::Shared deal;
    RowStatistics statistics[kWarps][Part::kRows];  // of each warp's keys of a part
    int is_last;  // whether all parts of the consumers' item are there
  };
};

}  // namespace cute_kernels::attention
