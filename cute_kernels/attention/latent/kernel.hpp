#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

#include "cute_kernels/attention/decode/epilogue.hpp"
#include "cute_kernels/attention/decode/unused_rows.hpp"
#include "cute_kernels/attention/latent/load.hpp"
#include "cute_kernels/attention/latent/mainloop.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/parameters.hpp"

namespace cute_kernels::attention {

/// What the kernel is told at run time.
struct LatentParams {
  CachedCall call;
  LatentSource source;
  ScoreUnits units;
  DecodeResults results;
  int num_splits;
};

/// CTA (x, y) has share x of the line, for tile y of the gridDim.y tiles that a key head's query
/// heads are divided among. Warpgroup 0 moves data, the others compute. All walk the same parts in
/// the same order, so that the barriers' phases are all they need to share.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    latent_kernel(CUTE_GRID_CONSTANT LatentParams const params) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
  bool const is_producer = cutlass::canonical_warp_group_idx() == 0;

  if (threadIdx.x == 0) {
    int const arrivals = params.source.box_rows > 0 ? 1 : kThreads;  // of one who loads a piece
    CUTLASS_PRAGMA_UNROLL
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      for (auto& piece : shared.full[stage]) piece.init(arrivals);
      for (int piece = 0; piece < Traits::kPieces; ++piece) {
        bool const is_of_both = params.source.pairs && blockIdx.y % 2 == Traits::half_of(piece);
        shared.empty[stage][piece].init(is_of_both ? 2 * kWarps : kWarps);
      }
    }
    shared.q_full.init(kThreads);
    shared.q_empty.init(Traits::kConsumers * kWarps);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kConsumers; ++i) {
      shared.p_full[i].init(kWarps);
      shared.cleared[i] = 0;
    }
    cutlass::arch::fence_barrier_init();
  }
  sm90::touch_parameters(params);
  params.source.pairs ? cute::cluster_sync() : __syncthreads();
  sm90::wait_for_previous_kernel();  // whatever it is: from here on memory is read
  auto const& share = Traits::Dealer::deal(params.call, params.num_splits, shared.deal);
  auto const first_part = [&] {
    return WorkWalk<Traits>(params.call, share.line, share.place, blockIdx.x);
  };

  if (is_producer) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    LatentLoader<Traits> loader(params.call, params.source, shared);
    for (auto walk = first_part(); walk.valid(); walk.advance()) loader.load(walk);
    sm90::let_next_kernel_start();
    clear_unused_rows<typename Traits::Element>(params.call, params.results);
    loader.drain();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    using Mainloop = LatentMainloop<Traits>;
    Mainloop mainloop(params.units, params.source, params.call, shared);
    DecodeEpilogue<Traits> epilogue(params.call, params.results, params.source.cache.group,
                                    params.units.log2_of_unit, shared);
    epilogue.begin(share);
    for (auto walk = first_part(); walk.valid(); walk.advance()) {
      typename Mainloop::Softmax softmax(params.units.log2_of_unit);
      auto out = Mainloop::empty_output();
      mainloop.compute(walk, softmax, out);
      WorkParts const parts = walk.parts();
      epilogue.store(walk, parts, softmax, sm90::rows_cols(out), Mainloop::place());
      epilogue.finish(walk, parts);
    }
  }
  __syncwarp();
  if (params.source.pairs) cute::cluster_sync();  // the other CTA's copies and arrivals have come
}

}  // namespace cute_kernels::attention
