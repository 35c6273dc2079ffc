#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/epilogue.hpp"
#include "cute_kernels/attention/prefill/calls.hpp"

namespace cute_kernels::attention {

/// Writes one warpgroup's 64 rows, which are of several heads: O through shared memory row by row,
/// and LSE straight from registers.
template <class Traits>
class GroupedEpilogue : ForwardEpilogue<Traits> {
  using Base = ForwardEpilogue<Traits>;
  using Element = typename Traits::Output;
  using SharedStorage = typename Traits::SharedStorage;

 public:
  template <class Params, class Softmax, class Output>
  CUTLASS_DEVICE static void store(Params const& params, SharedStorage& shared,
                                   typename Params::Tile const& coord, int warpgroup,
                                   Softmax const& softmax, Output const& out) {
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    int const first_row = params.first_query(coord) + warpgroup * Traits::kWarpgroupM;
    if (first_row < 0) {
      Base::skip(shared, warpgroup, thread == 0);
      return;
    }
    auto const shared_o = Base::to_shared(shared, warpgroup, thread, out);
    int const rows = min(Traits::kWarpgroupM, params.sequence(coord).seqlen_q - first_row);
    store_rows(params, coord, first_row, rows, thread, shared_o);
    sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup,
                       cutlass::NumThreadsPerWarpGroup);
    if (thread == 0) Base::free_buffer(shared, warpgroup);

    if (thread % 4 != 0) return;
    int const row = thread / 32 * 16 + thread % 32 / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (row + 8 * i >= rows) continue;
      auto const place = params.place_of(coord, first_row + row + 8 * i);
      params.lse[int64_t{place.head} * params.total_q + place.query] =
          softmax.lse(i, params.sink(coord, first_row + row + 8 * i));
    }
  }

  /// A later store to the same place comes behind a barrier of all threads.
  CUTLASS_DEVICE static void drain() {}

 private:
  template <class Params, class SharedOutput>
  CUTLASS_DEVICE static void store_rows(Params const& params, typename Params::Tile const& coord,
                                        int first_row, int rows, int thread,
                                        SharedOutput const& shared_o) {
    constexpr int kVector = sizeof(uint4) / sizeof(Element);
    constexpr int kVectors = Traits::kHeadDimV / kVector;
    constexpr int kRowsAtOnce = cutlass::NumThreadsPerWarpGroup / kVectors;
    int const channel = thread % kVectors * kVector;
    if (channel >= params.head_dim_v) return;
    for (int row = thread / kVectors; row < rows; row += kRowsAtOnce) {
      auto const place = params.place_of(coord, first_row + row);
      Element* const out = static_cast<Element*>(params.out) +
                           (int64_t{place.query} * params.heads_q + place.head) * params.head_dim_v;
      *reinterpret_cast<uint4*>(out + channel) =
          reinterpret_cast<uint4 const&>(shared_o(row, channel));
    }
  }
};

}  // namespace cute_kernels::attention
