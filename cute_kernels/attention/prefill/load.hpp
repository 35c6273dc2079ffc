#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/prefill/guard.hpp"
#include "cute_kernels/sm90/gather.hpp"

namespace cute_kernels::attention {

/// The producer warpgroup: one warp gathers Q, one loads K, one V, both by TMA in boxes of a page,
/// and one clears values which no row may see.
template <class Traits>
class CacheProducer {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Pipeline = typename Traits::Pipeline;
  using PipelineState = typename Traits::PipelineState;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  using Guard = PageGuard<Traits>;
  using Guarded = typename Guard::Guarded;
  using Hint = cute::TMA::CacheHintSm90;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kTileN = Traits::kTileN;
  static constexpr int kColumns = 64;  // of a row of the swizzle
  static constexpr int kRowBytes = kColumns * sizeof(Element);

  enum Warp { kQueries, kGuard, kKeys, kValues };

 public:
  /// Of one pass.
  template <class Params>
  CUTLASS_DEVICE void load(Params const& params, SharedStorage& shared, Pipeline& /*pipeline_k*/,
                           Pipeline& /*pipeline_v*/, int warp) {
    if (warp == kQueries) {
      load_queries(params, shared);
    } else if (warp == kGuard) {
      guard_.watch(params, shared);
    } else {
      load_boxes(params, shared, warp == kValues);
    }
    if (warp == kValues && cute::elect_one_sync()) {
      shared.passes.next_first_v_stage = write_.index();
    }
  }

  template <class Params>
  CUTLASS_DEVICE static void restore(Params const& params) {
    Guard::restore(params);
  }

 private:
  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }

  template <class Params>
  CUTLASS_DEVICE static BlockRange blocks_of(Params const& params,
                                             typename Params::Tile const& coord) {
    return params.mask_of(coord).key_blocks(params.first_query(coord), Traits::kTileM, kTileN);
  }

  /// What the warp's threads have copied is there for WGMMA too.
  CUTLASS_DEVICE static void arrive(Barrier const& barrier) {
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (cute::elect_one_sync()) barrier.cutlass::arch::ClusterBarrier::arrive();
  }

  /// What has been gathered is told of when all of a tile's is under way, or before waiting for a
  /// warpgroup that is behind the others.
  template <class Params>
  CUTLASS_DEVICE static void load_queries(Params const& params, SharedStorage& shared) {
    typename Params::Scheduler tile(params.scheduler);
    for (; tile.valid(); tile.advance()) {
      auto const coord = tile.coord();
      uint32_t const phase = tile.phase(shared.passes) ^ 1;
      int told = 0;
      auto tell = [&](int end) {
        sm90::wait_until_gathered();
        for (; told < end; ++told) arrive(shared.q_full[told]);
      };
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = 0; i < Traits::kConsumers; ++i) {
        if (!__all_sync(0xffffffff, shared.q_empty[i].try_wait(phase))) {
          tell(i);
          shared.q_empty[i].wait(phase);
        }
        int const first_row = params.first_query(coord) + i * Traits::kWarpgroupM;
        if (first_row < 0) continue;
        int const rows = params.sequence(coord).seqlen_q;
        auto offset_of = [&](int row) -> int64_t {
          if (first_row + row >= rows) return -1;
          auto const place = params.place_of(coord, first_row + row);
          return place.query * params.q.seqlen_stride + place.head * params.q.head_stride;
        };
        gather_rows<Traits::kWarpgroupM>(shared.q[i].data(),
                                         static_cast<Element const*>(params.q.data),
                                         params.head_dim, offset_of);
      }
      tell(Traits::kConsumers);
    }
    if (cute::elect_one_sync()) shared.passes.next_first_tile = tile.round() % 2;
  }

  /// The blocks of K or V of all tiles, by TMA. A lane finds a box's page one block ahead.
  template <class Params>
  CUTLASS_DEVICE void load_boxes(Params const& params, SharedStorage& shared, bool values) {
    bool const leader = cute::elect_one_sync();
    int const boxes = kTileN / params.box_rows;
    auto const* const descriptor = values ? &params.boxes_v : &params.boxes_k;
    for (typename Params::Scheduler tile(params.scheduler); tile.valid(); tile.advance()) {
      auto const coord = tile.coord();
      Sequence const sequence = params.sequence(coord);
      BlockRange const blocks = blocks_of(params, coord);
      Guarded const guarded(params, coord, blocks, shared.passes.guarded);
      auto find = [&](int block) {
        bool const any = lane() < boxes && block >= blocks.begin;
        return params.slot_of(sequence,
                              any ? block * kTileN + lane() * params.box_rows : sequence.seqlen_k);
      };
      auto next = find(blocks.end - 1);
      CUTLASS_PRAGMA_NO_UNROLL
      for (int block = blocks.end - 1; block >= blocks.begin; --block) {
        auto const own = next;
        next = find(block - 1);
        int const stage = write_.index();
        empty_barrier(shared, values).wait(write_.phase());
        Barrier& full = full_barrier(shared, values, guarded.has(block));
        if (leader) full.arrive_and_expect_tx(kTileN * Traits::kHeadDim * sizeof(Element));
        Element* const data = stage_data(shared, values, stage);
        CUTLASS_PRAGMA_NO_UNROLL
        for (int i = 0; i < boxes; ++i) {
          int const page = __shfl_sync(0xffffffff, own.page, i);
          int const slot = __shfl_sync(0xffffffff, own.slot, i);
          if (!leader) continue;
          CUTLASS_PRAGMA_UNROLL
          for (int column = 0; column < Traits::kHeadDim; column += kColumns) {
            cute::SM90_TMA_LOAD_4D::copy(descriptor, reinterpret_cast<uint64_t*>(&full),
                                         static_cast<uint64_t>(Hint::EVICT_LAST),
                                         data + column * kTileN + i * params.box_rows * kColumns,
                                         column, slot, coord.head, page);
          }
        }
        ++write_;
      }
    }
  }

  CUTLASS_DEVICE auto const& empty_barrier(SharedStorage& shared, bool values) const {
    return (values ? shared.pipeline_v : shared.pipeline_k).empty_barrier_[write_.index()];
  }
  CUTLASS_DEVICE Barrier& full_barrier(SharedStorage& shared, bool values, bool guarded) const {
    int const stage = write_.index();
    if (!values) return shared.pipeline_k.full_barrier_[stage];
    return guarded ? shared.guard.v_landed[stage] : shared.pipeline_v.full_barrier_[stage];
  }
  CUTLASS_DEVICE static Element* stage_data(SharedStorage& shared, bool values, int stage) {
    return (values ? shared.v.data() : shared.k.data()) + stage * kTileN * Traits::kHeadDim;
  }

  /// Copies rows to shared memory as WGMMA reads them, columns from `columns` on and rows whose
  /// offset is negative being 0. A lane finds a row for the warp.
  template <int kRows, class OffsetOf>
  CUTLASS_DEVICE static void gather_rows(Element* shared, Element const* global, int columns,
                                         OffsetOf const& offset_of) {
    constexpr int kVector = 16 / sizeof(Element);
    constexpr int kVectors = kColumns / kVector;  // of a row of the swizzle, which permutes them
    constexpr int kLanesOfRow = Traits::kHeadDim / kVector;
    constexpr int kRowsAtOnce = kLanes / kLanesOfRow;
    static_assert(kRows % kLanes == 0 && kLanes % kLanesOfRow == 0);
    int const part = lane() / kLanesOfRow, vector = lane() % kLanesOfRow;
    bool const has_columns = vector * kVector < columns;
    global += vector * kVector;
    uint32_t to = cute::cast_smem_ptr_to_uint(shared) + vector / kVectors * (kRows * kRowBytes) +
                  part * kRowBytes;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int first = 0; first < kRows; first += kLanes, to += kLanes * kRowBytes) {
      int64_t const found = offset_of(first + lane());
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kLanes; row += kRowsAtOnce) {
        int64_t const offset = __shfl_sync(0xffffffff, found, row + part);
        bool const there = offset >= 0 && has_columns;
        int const place = (vector ^ (row + part)) % kVectors;
        sm90::gather_or_clear(to + row * kRowBytes + place * 16, global + (there ? offset : 0),
                              there);
      }
    }
  }

  PipelineState write_ = cutlass::make_producer_start_state<Pipeline>();  // of K or V
  Guard guard_;
};

}  // namespace cute_kernels::attention
