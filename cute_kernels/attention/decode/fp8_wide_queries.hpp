#pragma once

#include "cute_kernels/attention/decode/fp8_queries.hpp"
#include "cute_kernels/attention/decode/fp8_wide_traits.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// The queries of a consumer warpgroup, where WGMMA reads them.
template <class Traits>
class Fp8WideQueries : Fp8Queries<Traits> {
  using Base = Fp8Queries<Traits>;
  using Base::column;
  using Base::kLanes;
  using Base::kLanesOfRow;
  using Base::kRowsAtOnce;
  using Base::kVector;
  using Base::lane;
  using typename Base::Walk;

  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
  static constexpr int kPassesAtOnce = 4;  // whose loads are on their way together
  static constexpr int kPasses = Traits::kWarpgroupM / (kRowsAtOnce * kWarps);
  static_assert(kPasses % kPassesAtOnce == 0);

 public:
  CUTLASS_DEVICE Fp8WideQueries(CachedCall const& call, CacheSource const& source,
                                EightBits const& format)
      : Base(call, source, format) {}

  /// By a whole warpgroup, number `warpgroup`, which has rows of the tile from `first_row` on.
  /// `unit`: what the sequence's products of numbers are multiplied by.
  CUTLASS_DEVICE void load(Walk const& walk, int warpgroup, int first_row, float unit,
                           typename Traits::SharedStorage& shared) const {
    int const rows = min(Traits::kWarpgroupM, walk.tile().rows - first_row);
    // Other warps' products with the rows of the part before have ended, too.
    sm90::barrier_sync(sm90::NamedBarrier::kQueriesWritten, warpgroup, kThreads);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int pass = 0; pass < kPasses && row_of(pass, 0) < rows; pass += kPassesAtOnce) {
      auto const own_row = [&](int i) { return row_of(pass + i, part()); };
      uint4 raw[kPassesAtOnce];
      uint32_t halves[kPassesAtOnce][kVector / 2];
      float unit_of_row[kPassesAtOnce];
      this->read_rows(walk, [&](int i) { return first_row + own_row(i); }, raw);
      this->halves_of_rows(raw, own_row, rows, halves, unit_of_row);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPassesAtOnce; ++i) {
        if (row_of(pass + i, 0) >= rows) break;  // the whole warp
        auto const& x = halves[i];
        *place(shared, warpgroup, own_row(i)) = {x[0], x[1], x[2], x[3]};
        if (column() == 0) shared.query_unit[warpgroup][own_row(i)] = unit_of_row[i] * unit;
      }
    }
    cutlass::arch::fence_view_async_shared();
    sm90::barrier_sync(sm90::NamedBarrier::kQueriesWritten, warpgroup, kThreads);
  }

 private:
  CUTLASS_DEVICE static int part() { return lane() / kLanesOfRow; }
  CUTLASS_DEVICE static int row_of(int pass, int part) {
    return (pass * kWarps + threadIdx.x / kLanes % kWarps) * kRowsAtOnce + part;
  }
  CUTLASS_DEVICE static uint4* place(typename Traits::SharedStorage& shared, int warpgroup,
                                     int row) {
    auto const layout = cute::as_position_independent_swizzle_layout(typename Traits::LayoutQ{});
    return reinterpret_cast<uint4*>(shared.q[warpgroup].data() + layout(row, column()));
  }
};

}  // namespace cute_kernels::attention
