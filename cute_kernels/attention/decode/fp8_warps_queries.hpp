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
  using Base::kRowsAtOnce;
  using Base::kVector;
  using Base::lane;

  // Rows of a thread are 8 apart: most tiles have rows of the first half alone.
  static constexpr int kRowsOfHalf = Traits::Part::kRows / 2;
  static constexpr int kPassesOfHalf = kRowsOfHalf / kRowsAtOnce;
  static_assert(kRowsOfHalf % kRowsAtOnce == 0);

 public:
  CUTLASS_DEVICE Fp8WarpsQueries(CachedCall const& call, CacheSource const& source,
                                 EightBits const& format)
      : Base(call, source, format) {}

  /// By a whole warp, which has rows of the tile from `first_row` on; rows behind the tile's last
  /// one become 0, or are left as they are where the thread's second rows are none of the tile's.
  /// unit(): what the sequence's products of numbers are multiplied by, which is read behind rows.
  template <class Unit>
  CUTLASS_DEVICE void load(Walk const& walk, int warp, int first_row, Unit const& unit,
                           SharedStorage& shared) const {
    int const rows = min(walk.tile().rows - first_row, Traits::Part::kRows);
    auto* const words = reinterpret_cast<uint32_t*>(shared.q[warp]);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int first = 0; first < rows; first += kRowsOfHalf) {
      auto const row_of = [&](int pass) {
        return first + pass * kRowsAtOnce + lane() / kLanesOfRow;
      };
      uint4 raw[kPassesOfHalf];
      uint32_t halves[kPassesOfHalf][kVector / 2];
      float unit_of_row[kPassesOfHalf];
      this->read_rows(walk, [&](int pass) { return first_row + row_of(pass); }, raw);
      float const unit_of_all = unit();
      this->halves_of_rows(raw, row_of, rows, halves, unit_of_row);
      CUTLASS_PRAGMA_UNROLL
      for (int pass = 0; pass < kPassesOfHalf; ++pass) {
        store(halves[pass], row_of(pass), words);
        if (column() == 0) {
          shared.query_unit[warp][row_of(pass)] = unit_of_row[pass] * unit_of_all;
        }
      }
    }
    __syncwarp();
  }

 private:
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
