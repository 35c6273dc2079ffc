#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/sm90/bulk_reduce.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// Writes one warpgroup's 64 rows: O through shared memory by TMA, which clips rows and columns
/// outside the tensor, and LSE straight from registers.
template <class Traits>
class ForwardEpilogue {
  using Element = typename Traits::Output;
  using SharedStorage = typename Traits::SharedStorage;

 public:
  /// `out` is normalised. Returns with the store in flight where O has memory of its own, otherwise
  /// when TMA has read that memory; only then may warpgroup's next queries be loaded, which q_empty
  /// tells the producer.
  template <class Params, class Softmax, class Output>
  CUTLASS_DEVICE static void store(Params const& params, SharedStorage& shared,
                                   typename Params::Tile const& coord, int warpgroup,
                                   Softmax const& softmax, Output const& out) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    bool const leader = thread == 0;
    int const first_query = params.first_query(coord) + warpgroup * Traits::kWarpgroupM;
    if (first_query < 0) {
      skip(shared, warpgroup, leader);
      return;
    }

    // Of any call these come from memory: while O goes to its buffer.
    auto const row_q = params.row_q(coord);
    int const batch = params.batch(coord), seqlen_q = params.mask_of(coord).seqlen_q;

    auto const shared_o = to_shared(shared, warpgroup, thread, out);
    // Whether the warpgroup's 64 rows are the sequence's, or behind it the tensor ends: TMA would
    // write on, into the rows of the next one.
    bool const is_whole = !Traits::kAnyCall || first_query + Traits::kWarpgroupM <= seqlen_q ||
                          row_q + seqlen_q == get<0>(params.shape_o);
    if constexpr (Traits::kAnyCall) {
      if (!is_whole) {
        store_rows(params, coord, first_query, thread, shared_o);
        sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup,
                           cutlass::NumThreadsPerWarpGroup);
        if (leader) free_buffer(shared, warpgroup);
      }
    }
    if (is_whole && leader) {
      auto o = domain_offset(make_coord(row_q, _0{}),
                             params.tma_o.get_tma_tensor(params.shape_o)(_, _, coord.head, batch));
      auto block = local_tile(o, Shape<Int<Traits::kWarpgroupM>, Int<Traits::kHeadDimV>>{},
                              make_coord(first_query / Traits::kWarpgroupM, _0{}));
      auto store = params.tma_o.get_slice(_0{});
      copy(params.tma_o, store.partition_S(shared_o), store.partition_D(block));
      tma_store_arrive();
      if constexpr (!Traits::kSeparateOutput || Traits::kSharedOutput) {
        tma_store_wait<0>();
        free_buffer(shared, warpgroup);
      }
    }

    int const row = first_query + thread / 32 * 16 + thread % 32 / 4;
    if (thread % 4 == 0) {
      int64_t const base =
          (static_cast<int64_t>(batch) * params.heads + coord.head) * get<0>(params.shape_q) +
          row_q;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (row + 8 * i >= seqlen_q) continue;
        if constexpr (Traits::kAnyCall) {
          params.lse[base + row + 8 * i] = softmax.lse(i, params.sink(coord));
        } else {
          params.lse[base + row + 8 * i] = softmax.lse(i);
        }
      }
    }
  }

  /// Shared memory must outlive the last store's reads, and a later store to the same place its
  /// writes.
  CUTLASS_DEVICE static void drain() { sm90::bulk_wait_complete(); }

 protected:
  /// Brings a warpgroup's O to its buffer, when that is free: for all of its threads, and for TMA.
  template <class Output>
  CUTLASS_DEVICE static auto to_shared(SharedStorage& shared, int warpgroup, int thread,
                                       Output const& out) {
    using namespace cute;
    auto shared_o =
        make_tensor(make_smem_ptr(buffer(shared, warpgroup)), typename Traits::LayoutO{});
    auto tiled_copy =
        make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, typename Traits::MmaOut{});
    auto slice = tiled_copy.get_thread_slice(thread);

    if constexpr (Traits::kSharedOutput) {
      wait_for_buffer(shared, warpgroup);
    } else if constexpr (Traits::kSeparateOutput) {
      if (thread == 0) tma_store_wait<0>();  // TMA has read the tile before
    }
    // Where O overwrites Q: all four warps are done with their products.
    sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup,
                       cutlass::NumThreadsPerWarpGroup);
    copy(tiled_copy, slice.retile_S(out), slice.partition_D(shared_o));
    tma_store_fence();
    sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup,
                       cutlass::NumThreadsPerWarpGroup);
    return shared_o;
  }

  /// Of a warpgroup that has no rows in a tile.
  CUTLASS_DEVICE static void skip(SharedStorage& shared, int warpgroup, bool leader) {
    if constexpr (Traits::kSharedOutput) wait_for_buffer(shared, warpgroup);
    if constexpr (!Traits::kSeparateOutput) {
      // One thread tells for all four warps that the tile is done: a warp that has not yet seen its
      // q_full would wait for a phase that is over.
      sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup,
                         cutlass::NumThreadsPerWarpGroup);
    }
    if (leader) free_buffer(shared, warpgroup);
  }

  /// Tells whoever waits for O's memory that TMA has read it.
  CUTLASS_DEVICE static void free_buffer(SharedStorage& shared, int warpgroup) {
    if constexpr (Traits::kSharedOutput) {
      shared.o_empty.arrive();
    } else if constexpr (!Traits::kSeparateOutput) {
      shared.q_empty[warpgroup].arrive();
    }
  }

 private:
  /// The rows of the sequence, from shared memory.
  template <class Params, class SharedOutput>
  CUTLASS_DEVICE static void store_rows(Params const& params, typename Params::Tile const& coord,
                                        int first_query, int thread, SharedOutput const& shared_o) {
    constexpr int kVector = sizeof(uint4) / sizeof(Element);
    constexpr int kVectors = Traits::kHeadDimV / kVector;
    Element* const out = rows_of<Element>(params.out, params.batch(coord), coord.head,
                                          params.row_q(coord) + first_query);
    int const rows = params.mask_of(coord).seqlen_q - first_query;
    int const channels = cute::get<1>(params.shape_o);
    for (int i = thread; i < rows * kVectors; i += cutlass::NumThreadsPerWarpGroup) {
      int const row = i / kVectors, channel = i % kVectors * kVector;
      if (channel >= channels) continue;
      *reinterpret_cast<uint4*>(out + row * params.out.seqlen_stride + channel) =
          reinterpret_cast<uint4 const&>(shared_o(row, channel));
    }
  }

  CUTLASS_DEVICE static Element* buffer(SharedStorage& shared, int warpgroup) {
    if constexpr (Traits::kSeparateOutput) {
      return shared.o[Traits::kSharedOutput ? 0 : warpgroup].data();
    } else {
      return shared.q[warpgroup].data();
    }
  }

  /// Of a buffer that two warpgroups use in turn. One use is one phase; warpgroup i's uses are
  /// those of parity i. Of a whole warp, and ended by a vote: behind a loop that ends thread by
  /// thread the compiler no longer knows what is the same in all threads, and keeps the mainloop's
  /// state out of uniform registers.
  CUTLASS_DEVICE static void wait_for_buffer(SharedStorage& shared, int warpgroup) {
    if (cutlass::canonical_warp_idx_sync() % cutlass::NumWarpsPerWarpGroup != 0) return;
    while (!__any_sync(0xffffffff, shared.o_empty.try_wait((warpgroup + 1) % 2))) continue;
  }
};

}  // namespace cute_kernels::attention
