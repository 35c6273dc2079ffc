#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/value_guard.hpp"
#include "cute_kernels/attention/window/params.hpp"

namespace cute_kernels::attention {

/// The producer: one thread loads K and V of the CTA's tiles, another Q, and tells consumers of
/// them. In a guarded pass a warp clears what of V is not finite before consumers see it.
template <class Traits>
class WindowLoader {
  using SharedStorage = typename Traits::SharedStorage;
  using Hint = cute::TMA::CacheHintSm90;

  /// A stage and its phase, of a ring of kCount.
  template <int kCount>
  struct Ring {
    int stage = 0;
    uint32_t phase = 0;

    CUTLASS_DEVICE void advance() {
      stage = stage + 1 == kCount ? 0 : stage + 1;
      phase ^= stage == 0;
    }
  };

 public:
  /// What a consumer is told of a tile, once q_full has let it by.
  CUTLASS_DEVICE static SeenTile told(SharedStorage const& shared, int stage) {
    asm volatile("" ::: "memory");  // the compiler may read across CUTLASS's barriers
    return shared.tiles[stage];
  }

  CUTLASS_DEVICE void load_keys(WindowParams const& params, SharedStorage& shared) {
    Ring<Traits::kStages>& ring = keys_;
    for (WindowTiles tiles(params); tiles.valid(); tiles.advance()) {
      auto const place = tiles.place();
      WorkTile const& tile = place.tile;
      int const key = params.keys.first(tile.first_row >> params.group_log2, tile.right_edge);
      int const row = tile.sequence.row_k + key;
      auto& full =
          shared.passes.guarded ? shared.kv_landed[ring.stage] : shared.kv_full[ring.stage];
      shared.kv_empty[ring.stage].wait(ring.phase ^ 1);
      full.arrive_and_expect_tx(params.tile_bytes);
      auto load = [&](cute::TmaDescriptor const& tma, void* to) {
        cute::SM90_TMA_LOAD_4D::copy(&tma, reinterpret_cast<uint64_t*>(&full),
                                     static_cast<uint64_t>(Hint::EVICT_LAST), to, 0, place.head_kv,
                                     row, tile.sequence.batch);
      };
      load(params.tma_k, shared.k[ring.stage]);
      load(params.tma_v, shared.v[ring.stage]);
      ring.advance();
    }
  }

  CUTLASS_DEVICE void load_queries(WindowParams const& params, SharedStorage& shared) {
    Ring<Traits::kQueryStages>& ring = queries_;
    for (WindowTiles tiles(params); tiles.valid(); tiles.advance()) {
      auto const [tile, head] = tiles.place();
      SeenTile const seen = seen_tile(tile, params.group_log2, params.keys, head);
      auto& full = shared.q_full[ring.stage];
      shared.q_empty[ring.stage].wait(ring.phase ^ 1);
      tell(shared, ring.stage, seen);
      full.arrive_and_expect_tx(Traits::kBytesQ);
      cute::SM90_TMA_LOAD_4D::copy(&params.tma_q, reinterpret_cast<uint64_t*>(&full),
                                   static_cast<uint64_t>(Hint::EVICT_FIRST), shared.q[ring.stage],
                                   0, head * params.group, seen.row, seen.batch);
      ring.advance();
    }
    shared.q_empty[ring.stage].wait(ring.phase ^ 1);
    tell(shared, ring.stage, {});  // there is no other tile
    cutlass::arch::ClusterBarrier const& full = shared.q_full[ring.stage];
    full.arrive();
    ring.advance();
  }

  /// Of a warp, in a guarded pass.
  CUTLASS_DEVICE static void guard_values(WindowParams const& params, SharedStorage& shared) {
    WindowTiles tiles(params);
    int stage = tiles.count() % Traits::kStages;  // behind those of the pass before
    uint32_t phases = 0;                          // of kv_landed, a bit for each stage
    for (; tiles.valid(); tiles.advance()) {
      shared.kv_landed[stage].wait(phases >> stage & 1);
      phases ^= 1u << stage;
      clear_values<Traits::kTileKeys * Traits::kHeadDimV>(shared.v[stage]);
      __syncwarp();
      if (cute::elect_one_sync()) {
        cutlass::arch::ClusterBarrier const& full = shared.kv_full[stage];
        full.arrive();
      }
      stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
    }
  }

 private:
  /// Between waiting for q_empty and arriving at q_full.
  CUTLASS_DEVICE static void tell(SharedStorage& shared, int stage, SeenTile const& tile) {
    asm volatile("" ::: "memory");
    shared.tiles[stage] = tile;
    asm volatile("" ::: "memory");
  }

  Ring<Traits::kStages> keys_;
  Ring<Traits::kQueryStages> queries_;
};

}  // namespace cute_kernels::attention
