#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/value_guard.hpp"
#include "cute_kernels/attention/prefill/calls.hpp"

namespace cute_kernels::attention {

/// ValueGuard of a cache. TMA brings whole boxes: of a sequence's last block also what lies behind
/// its keys, which may be NaN. So in a first pass, too, that block passes the guard, which clears
/// these rows.
template <class Traits>
class PageGuard : ValueGuard<Traits> {
  using Base = ValueGuard<Traits>;
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;

  static constexpr int kTileN = Traits::kTileN;

 public:
  /// Which blocks of V of a tile pass the guard: those before the one, and from the other on.
  struct Guarded {
    int before;
    int from;

    template <class Params>
    CUTLASS_DEVICE Guarded(Params const& params, typename Params::Tile const& coord,
                           BlockRange const& blocks, bool second_pass) {
      if (second_pass) {
        before = blocks.left_end();
        from = blocks.right_begin();
      } else {
        bool const cut = blocks.end * kTileN > params.sequence(coord).seqlen_k;
        before = blocks.begin;
        from = cut ? blocks.end - 1 : blocks.end;
      }
    }
    CUTLASS_DEVICE bool has(int block) const { return block < before || block >= from; }
  };

  /// The guard's work in one pass, of one warp.
  template <class Params>
  CUTLASS_DEVICE void watch(Params const& params, SharedStorage& shared) {
    bool const second_pass = shared.passes.guarded;
    int stage = shared.passes.first_v_stage;
    for (typename Params::Scheduler tile(params.scheduler); tile.valid(); tile.advance()) {
      auto const coord = tile.coord();
      BlockRange const blocks =
          params.mask_of(coord).key_blocks(params.first_query(coord), Traits::kTileM, kTileN);
      Guarded const guarded(params, coord, blocks, second_pass);
      auto look_at = [&](int end, int begin) {
        CUTLASS_PRAGMA_NO_UNROLL
        for (int block = end - 1; block >= begin; --block) {
          shared.guard.v_landed[stage].wait(phases_ >> stage & 1);
          phases_ ^= 1u << stage;
          Element* const values = shared.v.data() + stage * Base::kBlockElements;
          if (second_pass) {
            Base::clear(values);
          } else {
            clear_rows(values, params.sequence(coord).seqlen_k - block * kTileN);
          }
          __syncwarp();
          if (cute::elect_one_sync()) {
            shared.pipeline_v.full_barrier_[stage].cutlass::arch::ClusterBarrier::arrive();
          }
          stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
        }
      };
      look_at(blocks.end, guarded.from);
      stage = (stage + guarded.from - guarded.before) % Traits::kStages;
      look_at(guarded.before, blocks.begin);
    }
  }

  template <class Params>
  CUTLASS_DEVICE static void restore(Params const& params) {
    for (typename Params::Scheduler tile(params.scheduler); tile.valid(); tile.advance()) {
      auto const coord = tile.coord();
      auto values = [&](int key) -> Element const* {
        auto const at = params.slot_of(params.sequence(coord), key);
        int64_t const offset = params.offset_of(params.v, coord.head, at);
        return offset < 0 ? nullptr : static_cast<Element const*>(params.v.data) + offset;
      };
      auto results = [&](int row) {
        auto const place = params.place_of(coord, row);
        return static_cast<Element*>(params.out) +
               (int64_t{place.query} * params.heads_q + place.head) * params.head_dim_v;
      };
      Base::restore_tile(params, coord, params.head_dim_v, values, results);
    }
  }

 private:
  /// Rows from `first` on. They are 128 bytes in each column of the swizzle, which permutes these
  /// within a row.
  CUTLASS_DEVICE static void clear_rows(Element* values, int first) {
    constexpr int kVectors = 128 / sizeof(uint4);
    constexpr int kColumns = Traits::kHeadDimV * sizeof(Element) / 128;
    auto* const vectors = reinterpret_cast<uint4*>(values);
    CUTLASS_PRAGMA_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = first * kVectors + threadIdx.x % cutlass::NumThreadsPerWarp;
           i < kTileN * kVectors; i += cutlass::NumThreadsPerWarp) {
        vectors[column * kTileN * kVectors + i] = uint4{};
      }
    }
    cutlass::arch::fence_view_async_shared();
  }

  uint32_t phases_ = 0;  // of v_landed, a bit for each stage
};

}  // namespace cute_kernels::attention
