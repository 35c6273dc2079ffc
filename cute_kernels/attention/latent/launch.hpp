#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "cute_kernels/attention/decode/cache_boxes.hpp"
#include "cute_kernels/attention/decode/workspace.hpp"
#include "cute_kernels/attention/latent/boxes.hpp"
#include "cute_kernels/attention/latent/kernel.hpp"
#include "cute_kernels/attention/latent/problem.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::attention {

/// How many shares of the line there are, of as many CTAs each as a key head has tiles of heads.
template <class Traits>
int latent_shares(LatentProblem const& problem) {
  return std::max(1, decode_ctas<Traits>(problem.device) / problem.heads_of_key);
}

template <class Tile>
int64_t latent_workspace_bytes(LatentProblem const& problem) {
  using Traits = LatentTraits<Tile>;
  return DecodeWorkspace<Traits>(latent_shares<Traits>(problem) * problem.heads_of_key).end;
}

template <class Traits>
LatentSource latent_source(LatentProblem const& problem) {
  using Element = typename Traits::Element;
  CachedCall const& call = problem.call;
  LatentSource source{};
  source.box_rows = rows_of_latent_boxes(problem, Traits::kTileN);
  source.cache = cache_source(problem);
  source.qv = problem.qv;
  if (source.box_rows > 0) {
    source.pairs = problem.heads_of_key % 2 == 0;
    auto const boxes = [&](CacheView const& view, int columns) {
      return boxes_of<Element>(view, columns, call.heads_kv, problem.pages, source.box_rows);
    };
    source.boxes_k = boxes(problem.k, call.head_dim);
    source.boxes_v = boxes(problem.v, call.head_dim_v);
  }
  return source;
}

/// Starts the kernel of a tile on `stream`. Asynchronous.
template <class Tile>
cudaError_t launch_latent(LatentProblem const& problem, cudaStream_t stream) {
  using Traits = LatentTraits<Tile>;
  constexpr bool kIsBFloat16 = std::is_same_v<typename Traits::Element, cutlass::bfloat16_t>;
  int const shares = latent_shares<Traits>(problem);
  LatentParams params{problem.call, latent_source<Traits>(problem), score_units(problem.call),
                      decode_results<Traits>(problem, shares * problem.heads_of_key, kIsBFloat16),
                      problem.num_splits};
  // A multiprocessor reads the 128 KB of a part of 64 rows in 0.6 of the time of a block.
  params.call.part_cost = problem.call.group * 3 / 5;
  auto how = decode_launch<Traits>(problem.device, shares, stream);
  how.grid.y = problem.heads_of_key;
  if (params.source.pairs) how.cluster = dim3(1, 2);
  return sm90::launch_kernel<latent_kernel<Traits>>(how, params);
}

}  // namespace cute_kernels::attention
