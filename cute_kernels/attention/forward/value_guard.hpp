#pragma once

#include <type_traits>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/forward/key_walk.hpp"
#include "cute_kernels/attention/forward/places.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/ranges.hpp"
#include "cute_kernels/sm90/bulk_reduce.hpp"
#include "cute_kernels/sm90/finite.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// Makes what of V is not finite 0, in shared memory, before WGMMA reads it. Of a warp.
template <int kElements, class Element>
CUTLASS_DEVICE void clear_values(Element* values) {
  constexpr int kLanes = cutlass::NumThreadsPerWarp;
  int const lane = threadIdx.x % kLanes;
  if (__all_sync(0xffffffff, sm90::all_finite<kLanes, kElements>(values, lane))) return;
  sm90::clear_nonfinite<kLanes, kElements>(values, lane);
  cutlass::arch::fence_view_async_shared();
}

/// Keeps NaN and infinities of V out of rows that do not see them: where P is 0, P V would still be
/// NaN.
///
/// That shows: some element of O is not finite. So a CTA looks at its results, and if one is not
/// finite, does all of its tiles again, guarded: blocks that some query of the tile sees in part
/// then pass the guard, a warp that the producer has to spare, between TMA and the consumers. The
/// loader lets them land at v_landed, the guard clears what is not finite, and only then arrives at
/// the stage's full barrier. Rows that do see what was cleared get it back when all tiles are
/// stored, from the producer's warps: in the consumers' code such a branch, never taken, costs 2%
/// at head dim 64, since behind its loops the compiler no longer knows what is the same in all
/// threads.
template <class Traits>
class ValueGuard {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using PipelineState = typename Traits::PipelineState;

  using Variant = typename Traits::Variant;

 protected:
  static constexpr int kBlockElements = Traits::kTileN * Traits::kHeadDimV;

 public:
  CUTLASS_DEVICE static void prepare(SharedStorage& shared) {
    CUTLASS_PRAGMA_UNROLL
    for (int stage = 0; stage < Traits::kStages; ++stage) shared.guard.v_landed[stage].init(1);
  }

  /// Of all threads that have some of O, rounded.
  template <class Output>
  CUTLASS_DEVICE static bool all_finite(Output const& out) {
    constexpr int kProbes = 2;
    uint32_t probes[kProbes] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(out); i += 2) {
      uint32_t& probe = probes[i / 2 % kProbes];
      probe = sm90::probe_pair<Element>(reinterpret_cast<uint32_t const&>(out(i)), probe);
    }
    return (probes[0] | probes[1]) == 0;
  }

  /// The places of a tile's blocks, of which those that are not full are guarded.
  template <class Params>
  CUTLASS_DEVICE static BlockRange blocks(Params const& params,
                                          typename Params::Tile const& coord) {
    BlockRange blocks =
        key_walk<Traits>(params, coord, params.mask_of(coord), params.first_query(coord)).places;
    if constexpr (Variant::kHides) blocks.full_begin = blocks.full_end = 0;
    return blocks;
  }

  /// The loader's producer_acquire(). Returns the barrier for TMA.
  CUTLASS_DEVICE static uint64_t* acquire(SharedStorage& shared, PipelineState const& write,
                                          bool guarded) {
    int const stage = write.index();
    shared.pipeline_v.empty_barrier_[stage].wait(write.phase());
    auto* const landed = guarded ? shared.guard.v_landed : shared.pipeline_v.full_barrier_;
    landed[stage].arrive_and_expect_tx(Traits::kBytesV);
    return reinterpret_cast<uint64_t*>(&landed[stage]);
  }

  /// The guard's work: the guarded blocks, which are the first and the last of each tile, from V's
  /// stage `stage` on. Of one warp.
  template <class Params>
  CUTLASS_DEVICE static void watch(Params const& params, SharedStorage& shared, int stage) {
    uint32_t phases = 0;  // of v_landed, a bit for each stage
    for (typename Params::Scheduler tile(params.scheduler); tile.valid(); tile.advance()) {
      auto const coord = tile.coord();
      BlockRange const loaded = blocks(params, coord);
      auto look_at = [&](int blocks) {
        for (; blocks > 0; --blocks) {
          shared.guard.v_landed[stage].wait(phases >> stage & 1);
          phases ^= 1u << stage;
          clear(shared.v.data() + stage * kBlockElements);
          __syncwarp();
          if (cute::elect_one_sync()) {
            shared.pipeline_v.full_barrier_[stage].cutlass::arch::ClusterBarrier::arrive();
          }
          stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
        }
      };
      look_at(loaded.end - loaded.right_begin());
      stage = (stage + loaded.right_begin() - loaded.left_end()) % Traits::kStages;
      if constexpr (Traits::Calls::kHasLeftEnd) look_at(loaded.left_end() - loaded.begin);
    }
  }

  /// Adds what was cleared of V to the rows that see it: they become what is not finite. Of the
  /// producer's threads, when all tiles are stored.
  template <class Params>
  CUTLASS_DEVICE static void restore(Params const& params) {
    for (typename Params::Scheduler tile(params.scheduler); tile.valid(); tile.advance()) {
      auto const coord = tile.coord();
      Element const* const values = rows_of<Element>(
          params.v, params.batch(coord), params.heads_per_kv.div(coord.head), params.row_k(coord));
      Element* const out =
          rows_of<Element>(params.out, params.batch(coord), coord.head, params.row_q(coord));
      restore_tile(
          params, coord, cute::get<1>(params.shape_v),
          [&](int key) { return values + key * params.v.seqlen_stride; },
          [&](int query) { return out + query * params.out.seqlen_stride; });
    }
  }

 protected:
  CUTLASS_DEVICE static void clear(Element* values) { clear_values<kBlockElements>(values); }

  /// restore() of a tile. values(key) and results(query) are rows of V and O, the former null where
  /// there is none.
  template <class Params, class Values, class Results>
  CUTLASS_DEVICE static void restore_tile(Params const& params, typename Params::Tile const& coord,
                                          int channels, Values const& values,
                                          Results const& results) {
    int const first_query = params.first_query(coord);
    auto const& mask = params.mask_of(coord);
    BlockRange const loaded = blocks(params, coord);
    auto const places = places_of<Variant>(params, coord);
    int const end_query = min(first_query + Traits::kTileM, mask.seqlen_q);
    // A thread has channels of its own, so that each of its values is read and judged once.
    auto add_back = [&](int first_key, int end_key, int channel, bool asks = true) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int key = first_key; key < end_key; ++key) {
        Element const* const row = values(key);
        if (row == nullptr) continue;
        Element const value = row[channel];
        if (sm90::is_finite(value)) continue;
        int end = end_query;
        if constexpr (Traits::Calls::kHasLeftEnd) end = min(end, mask.end_query(key));
        CUTLASS_PRAGMA_NO_UNROLL
        for (int query = max(max(0, first_query), mask.first_query(key)); query < end; ++query) {
          if constexpr (Variant::kHides) {
            Place const here = places.template at<Variant>(query, key);
            if (asks && !Variant::Hooks::mask(here, params.variant)) continue;
          }
          Element& result = results(query)[channel];
          result = static_cast<Element>(static_cast<float>(result) + static_cast<float>(value));
        }
      }
    };
    for (int channel = threadIdx.x; channel < channels;
         channel += cutlass::NumThreadsPerWarpGroup) {
      int const end_key = mask.end_key(end_query - 1);
      if constexpr (Variant::kHasBlockMask) {
        auto const walk = key_walk<Traits>(params, coord, mask, first_query);
        for (int place = 0; place < walk.places.end; ++place) {
          int const first_key = walk.block(place) * Traits::kTileN;
          add_back(first_key, min(first_key + Traits::kTileN, end_key), channel,
                   !walk.entry(place).is_full());
        }
        continue;
      }
      add_back(loaded.right_begin() * Traits::kTileN, end_key, channel);
      if constexpr (Traits::Calls::kHasLeftEnd) {
        add_back(loaded.begin * Traits::kTileN, loaded.left_end() * Traits::kTileN, channel);
      }
    }
  }
};

}  // namespace cute_kernels::attention
