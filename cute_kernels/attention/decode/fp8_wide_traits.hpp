#pragma once

#include <cutlass/half.h>

#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/attention/decode/traits.hpp"

namespace cute_kernels::attention {

/// The kernel for a cache of 8 bits and many rows: the producer makes its numbers float16 in shared
/// memory, once for all rows, and products are WGMMA's, as of a cache of 16 bits.
template <class Tile_>
struct Fp8WideTraits : DecodeTraits<Tile_> {
  using Tile = Tile_;
  using Base = DecodeTraits<Tile>;
  static constexpr bool kEightBits = true;
  using Format = EightBits;
  static_assert(std::is_same_v<typename Base::Element, cutlass::half_t>);
  static_assert(Base::kConsumers == 2 && Base::kCtas == 1);
  static_assert(Base::kTileRows == Tile::kTileM);

  // A producer thread has more to do here.
  static constexpr int kProducerRegisters = 88;
  static constexpr int kConsumerRegisters = 208;

  static constexpr int kLookAhead = 1;           // code that converts, too, would be repeated
  static constexpr int kStaged = Tile::kStaged;  // blocks of 8 bits on their way
  static constexpr int kPieceBytes = 16;
  static constexpr int kProducerThreads = cutlass::NumThreadsPerWarpGroup;
  // Of K in a block, and as many of V: what one thread copies and converts.
  static constexpr int kPieces = Base::kTileN * Base::kHeadDim / kPieceBytes / kProducerThreads;

  struct SharedStorage : Base::SharedStorage {
    // A producer thread's own: of K and of V. What it has copied it alone reads.
    alignas(1024) uint4 staged[kStaged][2][kPieces][kProducerThreads];
    float staged_factors[kStaged][2][Base::kTileN];
    // Of the rows of K and of V in a stage, filled and freed with it.
    float key_factors[Base::kStages][Base::kTileN];
    float value_factors[Base::kStages][Base::kTileN];
    float query_unit[Base::kConsumers][Base::kWarpgroupM];  // what queries are multiples of
  };
};

}  // namespace cute_kernels::attention
