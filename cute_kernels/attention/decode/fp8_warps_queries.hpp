#pragma once

#include "cute_kernels/attention/decode/fp8_queries.hpp"
#include "cute_kernels/attention/decode/fp8_warps_traits.hpp"

namespace cute_kernels::attention {

/// The queries of a consumer warp, as A operands of its products.
template <class Traits>
class Fp8WarpsQueries : Fp8Queries<Traits> {
  using Base = Fp8Queries<Traits>;
  using typename Base::Walk;
  using SharedStorage = typename Traits::SharedStorage;
  using Base::column;
  using Base::kLanes;
  using Base::kLanesOfRow;
  using Base::kPassesAtOnce;
  using Base::kRowsAtOnce;
  using Base::kVector;
  using Base::lane;

  static constexpr int kPasses = Traits::Part::kRows / kRowsAtOnce;
  static_assert(kPasses % kPassesAtOnce == 0);

 public:
  CUTLASS_DEVICE Fp8WarpsQueries(CachedCall const& call, CacheSource const& source,
                                 EightBits const& format)
      : Base(call, source, format) {}

  /// By a whole warp, which has rows of the tile from `first_row` on; rows behind the tile's last
  /// one become 0. `unit`: what the sequence's products of numbers are multiplied by.
  CUTLASS_DEVICE void load(Walk const& walk, int warp, int first_row, float unit,
                           SharedStorage& shared) const {
    int const rows = walk.tile().rows - first_row;
    auto* const words = reinterpret_cast<uint32_t*>(shared.q[warp]);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int pass = 0; pass < kPasses; pass += kPassesAtOnce) {
      uint4 raw[kPassesAtOnce];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPassesAtOnce; ++i) {
        raw[i] = this->raw_row_or_zero(walk, first_row, row_of(pass + i), rows);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPassesAtOnce; ++i) {
        int const row = row_of(pass + i);
        uint32_t halves[kVector / 2] = {};
        float unit_of_row = 0.f;
        if ((pass + i) * kRowsAtOnce < rows) unit_of_row = this->halves_of_row(raw[i], halves);
        store(halves, row, words);
        if (column() == 0) shared.query_unit[warp][row] = unit_of_row * unit;
      }
    }
    __syncwarp();
  }

 private:
  CUTLASS_DEVICE static int row_of(int pass) { return pass * kRowsAtOnce + lane() / kLanesOfRow; }

  /// As A operands. Of a chunk's columns a lane of the product has four that follow one another, as
  /// it has of a row of K: the first two in the operand's first half, the others in the second.
  CUTLASS_DEVICE static void store(uint32_t const (&halves)[kVector / 2], int row,
                                   uint32_t* words) {
    int const chunk = column() / Traits::kChunk;
    int const first_lane = row % 8 * 4 + column() % Traits::kChunk / 4;
    uint32_t* const to = words + (chunk * kLanes + first_lane) * 4 + row / 8;
    to[0] = halves[0], to[2] = halves[1];
    to[4] = halves[2], to[6] = halves[3];
  }
};

}  // namespace cute_kernels::attention
