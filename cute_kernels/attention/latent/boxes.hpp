#pragma once

#include "cute_kernels/attention/latent/problem.hpp"
#include "cute_kernels/attention/prefill/boxes.hpp"

// Which loads of latent keys by TMA there are. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// As rows_of_boxes. Blocks are counted from the first key that a tile's rows see: in pages that
/// must be a sequence's first one.
inline int rows_of_latent_boxes(LatentProblem const& problem, int tile_n) {
  CachedCall const& call = problem.call;
  bool const sees_first = !call.mask.left && call.chunk == 0;
  return problem.pages.table == nullptr || sees_first ? rows_of_boxes(problem, tile_n) : 0;
}

}  // namespace cute_kernels::attention
