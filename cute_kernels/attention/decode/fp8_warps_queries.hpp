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

  static constexpr int kRowsOfHalf = Traits::Part::kRows / 2;
  static_assert(kRowsOfHalf % kRowsAtOnce == 0);

 public:
  CUTLASS_DEVICE Fp8WarpsQueries(CachedCall const& call, CacheSource const& source,
                                 EightBits const& format)
      : Base(call, source, format) {}

  /// By each of the warps that share rows' keys, some of these rows; rows behind the tile's last
  /// one become 0, or are left as they are where the thread's second rows are none of the tile's.
  /// factors(): of the sequence's queries times keys, and of values, which are read behind rows.
  template <class Factors>
  CUTLASS_DEVICE void load(Walk const& walk, typename Traits::Part const& part,
                           Factors const& factors, SharedStorage& shared) const {
    int const rows = walk.tile().rows - part.first_row;
    int const rows_of_threads = rows > kRowsOfHalf ? 2 * kRowsOfHalf : kRowsOfHalf;
    int const group = part.first_row / Traits::Part::kRows;
    auto* const words = reinterpret_cast<uint32_t*>(Traits::queries(shared, part.first_row));
    CUTLASS_PRAGMA_NO_UNROLL
    for (int pass = part.slice; pass * kRowsAtOnce < rows_of_threads; pass += part.step) {
      int const row = pass * kRowsAtOnce + lane() / kLanesOfRow;
      uint4 raw[1];
      uint32_t halves[1][kVector / 2];
      float unit[1];
      this->read_rows(walk, [&](int) { return part.first_row + row; }, raw);
      float2 const of_sequence = factors();
      this->halves_of_rows(raw, [&](int) { return row; }, rows, halves, unit);
      store(halves[0], row, words);
      if (column() == 0) shared.query_unit[group][row] = unit[0] * of_sequence.x;
      if (pass == 0) shared.value_unit = of_sequence.y;
    }
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
