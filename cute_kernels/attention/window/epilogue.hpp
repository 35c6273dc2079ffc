#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/window/params.hpp"
#include "cute_kernels/attention/window/rows.hpp"
#include "cute_kernels/sm90/bulk_reduce.hpp"
#include "cute_kernels/sm90/uniform.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// Writes a warp's 16 rows: O through shared memory of its own by TMA, so that warps need not meet,
/// and LSE straight from registers.
template <class Traits>
class WindowEpilogue {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;

 public:
  /// `out` is normalised and rounded. Returns with the store in flight.
  template <class Softmax, class Output>
  CUTLASS_DEVICE static void store(WindowParams const& params, SharedStorage& shared,
                                   SeenTile const& tile, WindowRows const& rows,
                                   Softmax const& softmax,
                                   float const (&sinks)[WindowRows::kOfThread], Output const& out) {
    int const lane = threadIdx.x % cutlass::NumThreadsPerWarp;
    int const first_head = tile.head_kv * params.group;
    if (sm90::uniform(tile.queries) > rows.last) {
      int const warp = cutlass::canonical_warp_idx_sync() - cutlass::NumWarpsPerWarpGroup;
      Element* const to = shared.o[warp];
      if (lane == 0) cute::tma_store_wait<0>();  // TMA has read the rows before
      __syncwarp();
      to_shared(to, lane, out);
      cute::tma_store_fence();
      __syncwarp();
      if (lane == 0) {
        cute::SM90_TMA_STORE_4D::copy(&params.tma_o, to, 0, first_head + rows.first_head,
                                      tile.row + rows.first, tile.batch);
        cute::tma_store_arrive();
      }
    } else {
      store_rows(params, tile, rows, lane, out);
    }
    if (lane % 4 != 0) return;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < WindowRows::kOfThread; ++i) {
      if (rows.query[i] >= tile.queries) continue;
      rows.lse(params, tile, i) = softmax.lse(i, sinks[i]);
    }
  }

  /// The stores of the thread are complete.
  CUTLASS_DEVICE static void drain() { sm90::bulk_wait_complete(); }

 private:
  /// The accumulator of a warp as rows of 128 bytes, in the swizzle.
  template <class Output>
  CUTLASS_DEVICE static void to_shared(Element* to, int lane, Output const& out) {
    constexpr int kVector = 16 / sizeof(Element);
    auto const* const pairs = reinterpret_cast<uint32_t const*>(out.data());
    // Of four 8 x 8 matrices, both halves of the rows for eight columns and for the next eight,
    // eight lanes each have a row.
    int const row = lane % 16, vector = lane / 16 ^ lane % 8;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kHeadDimV / kVector; i += 2) {
      Element* const place = to + row * Traits::kHeadDimV + (vector ^ i) * kVector;
      cute::SM90_U32x4_STSM_N::copy(pairs[2 * i], pairs[2 * i + 1], pairs[2 * i + 2],
                                    pairs[2 * i + 3], *reinterpret_cast<cute::uint128_t*>(place));
    }
  }

  /// Where the sequence ends between the warp's rows: TMA would write on.
  template <class Output>
  CUTLASS_DEVICE static void store_rows(WindowParams const& params, SeenTile const& tile,
                                        WindowRows const& rows, int lane, Output const& out) {
    auto const* const pairs = reinterpret_cast<uint32_t const*>(out.data());
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < WindowRows::kOfThread; ++i) {
      if (rows.query[i] >= tile.queries) continue;
      Element* const row =
          rows_of<Element>(params.out, tile.batch, tile.head_kv * params.group + rows.head[i],
                           tile.row + rows.query[i]);
      CUTLASS_PRAGMA_UNROLL
      for (int run = 0; run < Traits::kHeadDimV / 8; ++run) {
        int const channel = run * 8 + lane % 4 * 2;
        if (channel < params.head_dim_v) {
          *reinterpret_cast<uint32_t*>(row + channel) = pairs[2 * run + i];
        }
      }
    }
  }
};

}  // namespace cute_kernels::attention
