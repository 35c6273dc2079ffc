#pragma once

#include <cutlass/fast_math.h>

#include "cute_kernels/attention/schedule/work_list.hpp"
#include "cute_kernels/attention/tile_scheduler.hpp"

namespace cute_kernels::attention {

/// The order of a work list's tiles, with all heads of each. CTAs move on, as in an order of
/// bands: classes of length, each of which ends in the same places. Not where kMovesOn is false:
/// in an order in which length falls all along, two rounds, there and back, are even as they are.
template <int kNeighbours, bool kMovesOn = true>
class ListScheduler : public CtaRounds {
 public:
  struct Params {
    int const* count;  // of the list's tiles
    WorkTile const* tiles;
    int heads;
    cutlass::FastDivmod group;  // tiles of all heads that stand together (listed_tile)
  };

  static Params make_params(WorkList const& list, int heads) {
    return {list.count, list.tiles, heads, cutlass::FastDivmod(kNeighbours * heads)};
  }

  /// The list must be there.
  CUTLASS_DEVICE explicit ListScheduler(Params const& params)
      : params_(params), count_(*params.count) {}

  CUTLASS_DEVICE bool valid() const { return number() < count_ * params_.heads; }

  CUTLASS_DEVICE void advance() { next_round(kMovesOn ? gridDim.x / 4 : 0); }

  CUTLASS_DEVICE ListedTile coord() const {
    return listed_tile<kNeighbours>(number(), count_, params_.group);
  }

 private:
  Params const& params_;
  int count_;
};

}  // namespace cute_kernels::attention
