#pragma once

#include <type_traits>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/attention/tile_scheduler.hpp"
#include "cute_kernels/sm90/finite.hpp"

namespace cute_kernels::attention {

/// Keeps NaN and infinities of V out of rows that do not see them: where P is 0, P V would still be
/// NaN.
///
/// That shows: some element of O is not finite. So a CTA looks at its results, and if one is not
/// finite, does all of its tiles again, guarded: blocks that some query of the tile sees in part
/// then pass the guard, a warp that the producer has to spare, between TMA and the consumers. The
/// loader lets them land at v_landed, the guard clears what is not finite, and only then arrives at
/// the stage's full barrier. Rows that do see what was cleared get it back when the tile is
/// complete.
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
    float probe = 0.f;  // NaN from any that is not finite on
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(out); ++i) probe = __fmaf_rn(out(i), 0.f, probe);
    return probe == 0.f;
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
      for (int block = loaded.visited; block > loaded.full; --block) {
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
      stage = (stage + loaded.full) % Traits::kStages;
    }
  }

  /// Adds what was cleared of V to the rows that see it: their O becomes what is not finite. O is
  /// the (row, column) view of the warpgroup's accumulator.
  template <class Params, class Output>
  CUTLASS_DEVICE static void restore(Params const& params, TileCoord const& coord, int warpgroup,
                                     Output& out) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    int const first_query = params.first_query(coord);
    int const row = first_query + warpgroup * Traits::kWarpgroupM + thread / 32 * 16 +
                    thread % 32 / 4;
    int const column = thread % 4 * 2;
    BlockRange const loaded = params.mask.key_blocks(first_query, Traits::kTileM, Traits::kTileN);
    int const end = min(loaded.visited * Traits::kTileN, params.mask.seqlen_k);
    auto const* values = static_cast<Element const*>(params.v.data) +
                         coord.batch * params.v.batch_stride +
                         params.heads_per_kv.div(coord.head) * params.v.head_stride + column;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int key = loaded.full * Traits::kTileN; key < end; ++key) {
      bool const seen[2] = {key < params.mask.visible_keys(row),
                            key < params.mask.visible_keys(row + 8)};
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(out); ++col) {
        int const offset = 8 * (col / 2) + col % 2;
        if (column + offset >= get<1>(params.shape_v)) continue;
        Element const value = values[key * params.v.seqlen_stride + offset];
        if (sm90::is_finite(value)) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (seen[i]) out(i, col) += static_cast<float>(value);
        }
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
