#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "cute_kernels/attention/decode/epilogue.hpp"
#include "cute_kernels/attention/decode/fp8_warps_mainloop.hpp"
#include "cute_kernels/attention/decode/fp8_wide_load.hpp"
#include "cute_kernels/attention/decode/load.hpp"
#include "cute_kernels/attention/decode/mainloop.hpp"
#include "cute_kernels/attention/decode/unused_rows.hpp"
#include "cute_kernels/attention/decode/warp_walk.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/parameters.hpp"

namespace cute_kernels::attention {

/// What the kernel is told at run time.
template <class Traits>
struct DecodeParams {
  CachedCall call;
  CacheSource source;
  ScoreUnits units;
  DecodeResults results;
  int num_splits;
  typename Traits::Format format;
};

/// The first warpgroup moves data, or the first two do, the others compute. All walk the same parts
/// in the same order, so that the barriers' phases are all they need to share.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    decode_kernel(CUTE_GRID_CONSTANT DecodeParams<Traits> const params) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  constexpr int kConsumerWarps = Traits::kConsumers * cutlass::NumWarpsPerWarpGroup;
  int const warpgroup = cutlass::canonical_warp_group_idx();

  if (threadIdx.x == 0) {
    CUTLASS_PRAGMA_UNROLL
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.k_full[stage].init(Traits::kArrivalsOfFull);
      shared.v_full[stage].init(Traits::kArrivalsOfFull);
      shared.k_empty[stage].init(kConsumerWarps);
      shared.v_empty[stage].init(kConsumerWarps);
    }
    if constexpr (!Traits::kByWarps) {
      shared.q_full.init(cutlass::NumThreadsPerWarpGroup);
      shared.q_empty.init(kConsumerWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  sm90::touch_parameters(params);
  if constexpr (!Traits::kEightBits) CacheLoader<Traits>::clear_queries(shared);
  __syncthreads();
  sm90::wait_for_previous_kernel();  // whatever it is: from here on memory is read
  auto const& share = Traits::Dealer::deal(params.call, params.num_splits, shared.deal);
  auto const first_part = [&] {
    return WorkWalk<Traits>(params.call, share.line, share.place, blockIdx.x);
  };
  // The last warps of the CTA have one.
  auto const walk_in_memory = [&] {
    constexpr int kFirst = Traits::kThreads / cutlass::NumThreadsPerWarp - Traits::kWalks;
    return WarpWalk<Traits>(first_part, shared.walks[cutlass::canonical_warp_idx_sync() - kFirst]);
  };

  if (warpgroup < Traits::kProducers) {
    if constexpr (Traits::kReconfigureRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    }
    auto const walk_of_producer = [&] {
      if constexpr (Traits::kConverts) {
        return walk_in_memory();
      } else {
        return first_part();
      }
    };
    auto const produce = [&](auto loader) {
      for (auto walk = walk_of_producer(); walk.valid(); walk.advance()) loader.load(walk);
      loader.finish();
      sm90::let_next_kernel_start();
      if (warpgroup == 0) {
        clear_unused_rows<typename Traits::Element>(params.call, params.results);
      }
      loader.drain();
    };
    if constexpr (Traits::kConverts && Traits::kProducers == 1) {
      produce(Fp8WidePairLoader<Traits>(params.call, params.source, params.format, shared));
    } else if constexpr (Traits::kConverts) {
      if (warpgroup == 0) {
        produce(Fp8WideLoader<Traits, false>(params.call, params.source, params.format, shared));
      } else {
        produce(Fp8WideLoader<Traits, true>(params.call, params.source, params.format, shared));
      }
    } else {
      produce(CacheLoader<Traits>(params.call, params.source, params.format, shared));
    }
  } else {
    if constexpr (Traits::kReconfigureRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    }
    using Mainloop =
        std::conditional_t<Traits::kByWarps, Fp8WarpsMainloop<Traits>, DecodeMainloop<Traits>>;
    Mainloop mainloop(params.call, params.source, params.units, params.format, shared);
    DecodeEpilogue<Traits> epilogue(params.call, params.results, params.source.group,
                                    params.units.log2_of_unit, shared);
    auto const counters = epilogue.find_counters(share);
    if constexpr (!Traits::kByWarps) epilogue.open_counters(counters);
    auto walk = [&] {
      if constexpr (Traits::kWalksInMemory) {
        return walk_in_memory();
      } else {
        return first_part();
      }
    }();
    // Warps that read queries themselves do not wait for the counters before.
    if constexpr (Traits::kByWarps) epilogue.open_counters(counters);
    // Where queries are converted meanwhile, what the part's end needs is worked out before keys
    // are there, and kept in shared memory: each thread reads what it has written.
    auto const kept_parts = [&](auto& shared) -> WorkParts& {
      int const warp = cutlass::canonical_warp_idx_sync() - cutlass::NumWarpsPerWarpGroup;
      return reinterpret_cast<WorkParts&>(shared.parts[warp]);
    };
    auto const parts_of = [&](WorkWalk<Traits> const& walk) { return walk.parts(); };
    for (; walk.valid(); walk.advance()) {
      if constexpr (Traits::kByWarps) {
        kept_parts(shared) = parts_of(walk);
      }
      typename Mainloop::Softmax softmax(params.units.log2_of_unit);
      auto out = Mainloop::empty_output();
      mainloop.compute(walk, softmax, out);
      WorkParts const parts = [&] {
        if constexpr (Traits::kByWarps) {
          return kept_parts(shared);
        } else {
          return parts_of(walk);
        }
      }();
      mainloop.finish(walk, softmax, out, [&](auto const& rows, AccumulatorPlace const& place) {
        epilogue.store(walk, parts, softmax, rows, place);
      });
      epilogue.finish(walk, parts);
    }
  }
}

}  // namespace cute_kernels::attention
