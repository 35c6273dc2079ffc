#pragma once

#include <type_traits>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/tile_scheduler.hpp"
#include "cute_kernels/sm90/bulk_reduce.hpp"
#include "cute_kernels/sm90/finite.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// Keeps NaN and infinities of V out of rows that do not see them: where P is 0, P V would still be
/// NaN.
///
/// That shows: some element of O is not finite. So a CTA looks at its results, and if one is not
/// finite, does all of its tiles again, guarded: blocks that some query of the tile sees in part
/// then pass the guard, a warp that the producer has to spare, between TMA and the consumers. The
/// loader lets them land at v_landed, the guard clears what is not finite, and only then arrives at
/// the stage's full barrier. Rows that do see what was cleared get it back when the tile is
/// stored.
template <class Traits>
class ValueGuard {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using PipelineState = typename Traits::PipelineState;

  static constexpr int kBlockElements = Traits::kTileN * Traits::kHeadDimV;

 public:
  CUTLASS_DEVICE static void prepare(SharedStorage& shared) {
    CUTLASS_PRAGMA_UNROLL
    for (int stage = 0; stage < Traits::kStages; ++stage) shared.guard.v_landed[stage].init(1);
    shared.guard.cleared[0] = shared.guard.cleared[1] = false;
  }

  /// Of all threads that have some of O.
  template <class Output>
  CUTLASS_DEVICE static bool all_finite(Output const& out) {
    constexpr int kProbes = 4;
    float probe[kProbes] = {};  // NaN from any element that is not finite on
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(out); ++i) {
      probe[i % kProbes] = __fmaf_rn(out(i), 0.f, probe[i % kProbes]);
    }
    return probe[0] + probe[1] + probe[2] + probe[3] == 0.f;
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

  /// The guard's work: the guarded blocks, which are the first of each tile, from V's stage `stage`
  /// on. Of one warp.
  ///
  /// A tile's flag is written before its first block is handed on, and no V of a tile is loaded
  /// before all have read the flag of the tile before the last: Q of the last would not have been
  /// released.
  template <class Params>
  CUTLASS_DEVICE static void watch(Params const& params, SharedStorage& shared, int stage) {
    uint32_t phases = 0;  // of v_landed, a bit for each stage
    for (TileScheduler tile(params.scheduler); tile.valid(); tile.advance()) {
      BlockRange const loaded =
          params.mask.key_blocks(params.first_query(tile.coord()), Traits::kTileM, Traits::kTileN);
      bool cleared = false;
      for (int block = loaded.end; block > loaded.full_end; --block) {
        shared.guard.v_landed[stage].wait(phases >> stage & 1);
        phases ^= 1u << stage;
        cleared |= clear(shared.v.data() + stage * kBlockElements);
        shared.guard.cleared[tile.phase(shared.passes)] = cleared;
        __syncwarp();
        if (cute::elect_one_sync()) {
          shared.pipeline_v.full_barrier_[stage].cutlass::arch::ClusterBarrier::arrive();
        }
        stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
      }
      stage = (stage + loaded.full_end) % Traits::kStages;
    }
  }

  /// Adds what was cleared of V to the rows of a warpgroup that see it, where they are stored: they
  /// become what is not finite. Of all threads of the warpgroup, the first of which has stored.
  template <class Params>
  CUTLASS_DEVICE static void restore(Params const& params, TileCoord const& coord, int warpgroup) {
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    sm90::bulk_wait_complete();
    sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup,
                       cutlass::NumThreadsPerWarpGroup);
    int const tile_query = params.first_query(coord);
    int const first_query = tile_query + warpgroup * Traits::kWarpgroupM;
    BlockRange const loaded = params.mask.key_blocks(tile_query, Traits::kTileM, Traits::kTileN);
    auto head_of = [&](TensorView const& view, int head) {
      return static_cast<Element*>(view.data) + coord.batch * view.batch_stride +
             head * view.head_stride;
    };
    Element const* const values = head_of(params.v, params.heads_per_kv.div(coord.head));
    Element* const out = head_of(params.out, coord.head);
    int const channels = cute::get<1>(params.shape_v);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = thread; i < Traits::kWarpgroupM * channels; i += cutlass::NumThreadsPerWarpGroup) {
      int const query = first_query + i / channels;
      int const channel = i % channels;
      if (query < 0 || query >= params.mask.seqlen_q) continue;
      int const end = params.mask.end_key(query);
      Element& result = out[query * params.out.seqlen_stride + channel];
      for (int key = loaded.full_end * Traits::kTileN; key < end; ++key) {
        Element const value = values[key * params.v.seqlen_stride + channel];
        if (sm90::is_finite(value)) continue;
        result = static_cast<Element>(static_cast<float>(result) + static_cast<float>(value));
      }
    }
  }

 private:
  /// Makes what is not finite 0, and says whether there was any.
  CUTLASS_DEVICE static bool clear(Element* values) {
    constexpr int kLanes = cutlass::NumThreadsPerWarp;
    int const lane = threadIdx.x % kLanes;
    if (__all_sync(0xffffffff, sm90::all_finite<kLanes, kBlockElements>(values, lane))) {
      return false;
    }
    sm90::clear_nonfinite<kLanes, kBlockElements>(values, lane);
    cutlass::arch::fence_view_async_shared();
    return true;
  }
};

}  // namespace cute_kernels::attention
