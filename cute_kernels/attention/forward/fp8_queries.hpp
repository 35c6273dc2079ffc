#pragma once

#include <type_traits>

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/fp8/row_block.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// A consumer warpgroup's 64 queries from 16 bits in global memory to the 8 bits that its products
/// read: what a kernel of its own would do before, without the way through memory, while other
/// warpgroups are at their products.
template <class Traits>
class QueryQuantizer {
  static_assert(fp8::kBlockRows == Traits::kWarpgroupM);

  struct Team {
    int warpgroup;
    CUTLASS_DEVICE static int thread() { return threadIdx.x % cutlass::NumThreadsPerWarpGroup; }
    CUTLASS_DEVICE void sync() const {
      sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup,
                         cutlass::NumThreadsPerWarpGroup);
    }
  };

  template <class In>
  using Block = fp8::RowBlock<Team, In, typename Traits::ElementQk, Traits::kHeadDim,
                              Traits::kHeadDim == 256 ? 4 : 2>;

 public:
  using SharedStorage = typename Traits::SharedStorage;

  /// Once, by the whole CTA, which must meet before run().
  CUTLASS_DEVICE static void prepare(SharedStorage& shared, fp8::RowTransform const& transform) {
    static_assert(Traits::kThreads >= Traits::kHeadDim);
    if (threadIdx.x < Traits::kHeadDim) {
      fp8::write_sign(shared.signs.data(), transform, threadIdx.x);
    }
  }

  /// Called by the warpgroup when its last products are done; it may issue the next ones
  /// afterwards. Returns the scale of the queries, which are those of one head from first_query on.
  CUTLASS_DEVICE static float run(RawQueries const& raw, SharedStorage& shared,
                                  TileCoord const& coord, int first_query, int seqlen,
                                  int warpgroup) {
    return raw.float16
               ? run_from<cutlass::half_t>(raw, shared, coord, first_query, seqlen, warpgroup)
               : run_from<cutlass::bfloat16_t>(raw, shared, coord, first_query, seqlen, warpgroup);
  }

 private:
  template <class In>
  CUTLASS_DEVICE static float run_from(RawQueries const& raw, SharedStorage& shared,
                                       TileCoord const& coord, int first_query, int seqlen,
                                       int warpgroup) {
    using Rows = Block<In>;
    static_assert(Rows::kThreads == cutlass::NumThreadsPerWarpGroup);
    auto const* const head = static_cast<In const*>(raw.view.data) +
                             coord.batch * raw.view.batch_stride +
                             coord.head * raw.view.head_stride;
    Rows const rows({warpgroup}, head, raw.view.seqlen_stride, first_query, seqlen,
                    raw.transform.incoherent,
                    {shared.signs.data(), nullptr, shared.maximum[warpgroup]});
    typename Rows::Raw elements;
    rows.load(elements);
    typename Rows::Values x;
    auto const factors = rows.transform(elements, x);
    rows.template round<true>(x, factors.to_bytes, [&](int row, int channel, uint2 bytes) {
      *reinterpret_cast<uint2*>(shared.q[warpgroup].data() +
                                typename Traits::LayoutQ{}(row, channel)) = bytes;
    });
    cutlass::arch::fence_view_async_shared();
    Team{warpgroup}.sync();
    return factors.scale;
  }
};

}  // namespace cute_kernels::attention
