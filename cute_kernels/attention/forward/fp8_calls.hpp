#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/calls.hpp"
#include "cute_kernels/attention/fp8_problem.hpp"

// What an FP8 forward kernel is told of its calls, beside what every forward kernel is: which
// scales are a sequence's, and where its V stands.
namespace cute_kernels::attention {

template <int kTileM>
struct Fp8DenseCalls : DenseCalls<kTileM> {
  using Tile = typename DenseCalls<kTileM>::Tile;

  CUTLASS_DEVICE int entry(Tile const& tile) const { return tile.batch; }
  CUTLASS_DEVICE static cute::_0 value_column(Tile const&) { return {}; }
};

template <int kNeighbours>
struct Fp8AnyCalls : AnyCalls<kNeighbours> {
  using Base = AnyCalls<kNeighbours>;
  using Tile = typename Base::Tile;

  bool is_packed;
  bool exact_lse;
  float const* score_offset;  // of the LSE's shape, or null

  /// The sequence's number, which its scales go by.
  CUTLASS_DEVICE int entry(Tile const& tile) const { return Base::batch(tile); }
  CUTLASS_DEVICE int batch(Tile const& tile) const { return is_packed ? 0 : entry(tile); }

  /// The first of its blocks of rows with a scale.
  CUTLASS_DEVICE int query_block(Tile const& tile) const {
    return is_packed ? first_block(Base::row_q(tile), entry(tile), kScaleRows) : 0;
  }
  CUTLASS_DEVICE int key_block(Tile const& tile) const {
    return is_packed ? first_block(Base::row_k(tile), entry(tile), kScaleRows) : 0;
  }
  /// Of its first key in the transposed V.
  CUTLASS_DEVICE int value_column(Tile const& tile) const {
    return is_packed ? packed_value_column(Base::row_k(tile), entry(tile)) : 0;
  }
};

}  // namespace cute_kernels::attention
