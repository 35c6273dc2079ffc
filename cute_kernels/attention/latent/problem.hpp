#pragma once

#include "cute_kernels/attention/decode/problem.hpp"

// One call of attention to a cache of latents: keys of which a part are the values, too. Plain
// structs: nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// A DecodeProblem whose scores are q k + qv v. `call` has head_dim of q and k and head_dim_v of qv
/// and v.
///
/// Where a key head has the query heads of several tiles, the call's group is one tile's of them,
/// and `heads_of_key` how many there are: as many CTAs walk over the same keys at the same time.
struct LatentProblem : DecodeProblem {
  TensorView qv;  // (total_q, heads_q, head_dim_v)
  int heads_of_key = 1;
};

/// Divides a key head's query heads among tiles of so many rows, where a token's rows are several
/// of them.
constexpr void divide_key_heads(LatentProblem& problem, int tile_rows) {
  CachedCall& call = problem.call;
  if (call.group % tile_rows != 0) return;
  problem.heads_of_key = call.group / tile_rows;
  call.group = tile_rows;
}

}  // namespace cute_kernels::attention
