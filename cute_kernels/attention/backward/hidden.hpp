#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/statistics.hpp"
#include "cute_kernels/sm90/finite.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

// Keeps NaN and infinities out of gradients of what a mask hides them from. P and dS are 0 there,
// but 0 times NaN is NaN: so the other factor, K of dQ, Q of dK, dO of dV, is cleared where it is
// not finite. Who does see it has NaN in P or dS by then, from lse or delta; but for dV, which
// restores dO.
namespace cute_kernels::attention {

/// Clears what is not finite in a warp's 16 rows of a (rows, channels) tile of 128-byte swizzled
/// columns, and returns a bit for each row that had some. A swizzle keeps rows together.
template <int kRows, int kChannels, class Element>
CUTLASS_DEVICE uint32_t clear_rows(Element* tile, int first_row) {
  constexpr int kColumn = 64;  // elements of a swizzled column
  constexpr int kVector = 8;   // of 16 bytes
  constexpr int kLanesOfRow = 2;
  constexpr int kTurns = kColumn / kVector / kLanesOfRow;
  int const lane = threadIdx.x % cutlass::NumThreadsPerWarp;
  int const row = lane / kLanesOfRow;
  bool bad = false;
  auto vector = [&](int column, int turn) {
    int const at = lane % kLanesOfRow * kTurns + (turn + row) % kTurns;  // spread over the banks
    return tile + (column * kRows + first_row + row) * kColumn + at * kVector;
  };
  CUTLASS_PRAGMA_UNROLL
  for (int column = 0; column < kChannels / kColumn; ++column) {
    CUTLASS_PRAGMA_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      bad |= !sm90::all_finite<1, kVector>(vector(column, turn), 0);
    }
  }
  uint32_t const lanes = __ballot_sync(0xffffffff, bad);
  if (lanes == 0) return 0;
  uint32_t rows = 0;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 16; ++i) rows |= (lanes >> (2 * i) & 3) != 0 ? 1u << i : 0u;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int column = 0; column < kChannels / kColumn; ++column) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      sm90::clear_nonfinite<1, kVector>(vector(column, turn), 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
  return rows;
}

/// Makes P of keys that are not finite NaN. `rows`: what clear_rows() said of the warp's keys.
template <class Probabilities>
CUTLASS_DEVICE void spoil_keys(Probabilities& p, uint32_t rows, int thread) {
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < 2; ++row) {
    if ((rows >> (thread % 32 / 4 + 8 * row) & 1) == 0) continue;
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < cute::size<1>(p); ++col) p(row, col) = NAN;
  }
}

/// P of blocks with flags: never above 1, as rounding of a large lse would have it.
template <class Probabilities>
CUTLASS_DEVICE void bound_probabilities(Probabilities& p) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(p); ++i) p(i) = p(i) > 1.f ? 1.f : p(i);  // NaN stays
}

/// dP - delta of blocks with flags: infinities become NaN.
template <class Gradients>
CUTLASS_DEVICE void spoil_infinities(Gradients& gradients) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < cute::size(gradients); ++i) {
    gradients(i) += gradients(i) - gradients(i);
  }
}

/// The step's Q and dO, between all warpgroups' S and dP, and the products that take them as the
/// other factor. restore() adds what is cleared of dO where it is seen.
template <class Traits>
struct HiddenQueries {
  using SharedStorage = typename Traits::SharedStorage;

  template <class Restore>
  CUTLASS_DEVICE static void clear(SharedStorage& shared, int stage, Restore const& restore) {
    constexpr int kThreads = Traits::kConsumers * cutlass::NumThreadsPerWarpGroup;
    constexpr int kElements = Traits::kTileM * Traits::kHeadDim;
    auto meet = [] { sm90::barrier_sync(sm90::NamedBarrier::kQueriesCleared, 0, kThreads); };
    int const thread = threadIdx.x - cutlass::NumThreadsPerWarpGroup;
    meet();
    restore();
    meet();
    sm90::clear_nonfinite<kThreads, kElements>(shared.q.data() + stage * kElements, thread);
    sm90::clear_nonfinite<kThreads, kElements>(shared.grad_out.data() + stage * kElements, thread);
    cutlass::arch::fence_view_async_shared();
    meet();
  }

  /// Adds what is not finite of dO to dV of the keys that its query sees, as P would. `dv` is the
  /// (row, column) view of the accumulator; `key` the thread's first row, `query` the step's first.
  template <class Mask, class Gradient>
  CUTLASS_DEVICE static void restore(SharedStorage& shared, Mask const& mask, int stage, int key,
                                     int query, int thread, Gradient&& dv) {
    using namespace cute;
    auto grad_out = make_tensor(make_smem_ptr(shared.grad_out.data()), typename Traits::LayoutQ{});
    int const column = thread % 4 * 2;
    int const first[2] = {mask.first_query(key), mask.first_query(key + 8)};
    CUTLASS_PRAGMA_NO_UNROLL
    for (int row = 0; row < Traits::kTileM; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(dv); ++col) {
        auto const value = grad_out(row, column + 8 * (col / 2) + col % 2, stage);
        if (sm90::is_finite(value)) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (query + row >= first[i]) dv(i, col) += static_cast<float>(value);
        }
      }
    }
  }
};

}  // namespace cute_kernels::attention
