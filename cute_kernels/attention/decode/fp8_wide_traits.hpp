#pragma once

#include <cutlass/half.h>

#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/attention/decode/traits.hpp"

namespace cute_kernels::attention {

/// The kernel for a cache of 8 bits and many rows: producers make its numbers float16 in shared
/// memory, once for all rows, and products are WGMMA's, as of a cache of 16 bits. With two consumer
/// warpgroups producer warpgroup 0 has K, 1 has V: what binds is not what a warp does but what it
/// waits for, and so each scheduler has two of them. With three there is one for both: products
/// take half as long again.
template <class Tile_>
struct Fp8WideTraits : DecodeTraits<Tile_, true> {
  using Tile = Tile_;
  using Base = DecodeTraits<Tile, true>;
  static constexpr bool kEightBits = true;
  using Format = EightBits;
  static_assert(std::is_same_v<typename Base::Element, cutlass::half_t>);
  static_assert((Base::kConsumers == 2 || Base::kConsumers == 3) && Base::kCtas == 1);
  static_assert(Base::kTileRows == Tile::kTileM);

  // A multiprocessor has 512 for four threads.
  static constexpr int kProducerRegisters = Base::kProducers == 2 ? 48 : 56;
  static constexpr int kConsumerRegisters = Base::kProducers == 2 ? 208 : 152;
  static constexpr int kArrivalsOfFull = cutlass::NumWarpsPerWarpGroup;

  static constexpr int kLookAhead = 1;           // code that converts, too, would be repeated
  static constexpr int kStaged = Tile::kStaged;  // slots of 8 bits on their way
  static constexpr int kPieceBytes = 16;
  static constexpr int kProducerThreads = cutlass::NumThreadsPerWarpGroup;
  // Of K or of V in a block: what one thread copies and converts, and so many at a time, a slot.
  static constexpr int kPieces = Base::kTileN * Base::kHeadDim / kPieceBytes / kProducerThreads;
  static constexpr int kPiecesOfSlot = kPieces % 4 == 0   ? 4
                                       : kPieces % 3 == 0 ? 3
                                       : kPieces % 2 == 0 ? 2
                                                          : 1;

  struct SharedStorage : Base::SharedStorage {
    // A producer thread's own: of K or of V. What it has copied it alone reads.
    alignas(1024) uint4 staged[2][kStaged][kPiecesOfSlot][kProducerThreads];
    // Of a block, in its first slot's place.
    float staged_factors[2][kStaged][Base::kTileN];
    // Of the rows of K and of V in a stage, filled and freed with it.
    float key_factors[Base::kStages][Base::kTileN];
    float value_factors[Base::kStages][Base::kTileN];
    float query_unit[Base::kConsumers][Base::kWarpgroupM];  // what queries are multiples of
  };
};

}  // namespace cute_kernels::attention
