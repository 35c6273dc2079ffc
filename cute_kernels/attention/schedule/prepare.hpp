#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/schedule/work_list.hpp"
#include "cute_kernels/attention/unused_rows.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/launch.hpp"

// The kernel that runs before one that walks a work list.
namespace cute_kernels::attention {

/// Where packed queries lie.
struct QuerySlots {
  int const* cu_seqlens;  // (entries + 1)
  int const* seqused;     // (entries), or null
  int total;
  int entries;
};

/// Of `ctas` CTAs with `threads` threads, of which this is number `cta`. A warp looks at 32 rows,
/// then clears together those that are not used.
CUTLASS_DEVICE void clear_unused_slots(QuerySlots const& slots, UnusedRows const& unused, int cta,
                                       int ctas, int threads) {
  constexpr int kWarpThreads = 32;
  int const lane = threadIdx.x % kWarpThreads;
  int const warps = ctas * (threads / kWarpThreads);
  int const warp = (cta * threads + threadIdx.x) / kWarpThreads;
  for (int64_t first = int64_t{warp} * kWarpThreads; first < slots.total;
       first += int64_t{warps} * kWarpThreads) {
    int const own = static_cast<int>(first) + lane;
    bool const is_unused = first + lane < slots.total && !is_used(slots.cu_seqlens, slots.seqused,
                                                                  slots.total, slots.entries, own);
    for (unsigned rows = __ballot_sync(0xffffffff, is_unused); rows != 0; rows &= rows - 1) {
      unused.clear(first + __ffs(rows) - 1, lane, kWarpThreads);
    }
  }
}

/// Clears unused rows of Q's results.
struct ClearUnused {
  QuerySlots slots;
  UnusedRows unused;

  CUTLASS_DEVICE void operator()(int cta, int ctas, int threads) const {
    clear_unused_slots(slots, unused, cta, ctas, threads);
  }
};

/// The first CTA builds the list, the others do the rest, rest(cta, ctas, threads). Its end is that
/// of the kernel before it, too: whoever waits for it waits for both. Unless it is `independent` of
/// what that kernel reads and writes, it begins with this.
template <class Tiling, class Call, class Rest>
__global__ void __launch_bounds__(WorkListBuilder<Tiling, Call>::kThreads)
    prepare_kernel(CUTE_GRID_CONSTANT Call const call, CUTE_GRID_CONSTANT WorkList const list,
                   CUTE_GRID_CONSTANT Rest const rest, bool independent) {
  using Builder = WorkListBuilder<Tiling, Call>;
  sm90::let_next_kernel_start();
  if (!independent) sm90::wait_for_previous_kernel();
  if (blockIdx.x == 0) {
    __shared__ typename Builder::Shared shared;
    Builder builder(call, list, shared);
    cute::for_each(cute::make_seq<Builder::kPhases>{}, [&](auto phase) {
      builder.template phase<phase>(threadIdx.x);
      __syncthreads();
    });
    sm90::wait_for_previous_kernel();
    return;
  }
  rest(blockIdx.x - 1, gridDim.x - 1, Builder::kThreads);
}

/// Starts it with `ctas` for the rest, early if it may. So does the next kernel, and then waits for
/// this one itself. `independent`: what the kernel before it writes is neither read nor written
/// here.
template <class Tiling, class Call, class Rest>
cudaError_t start_preparing(Call const& call, WorkList const& list, Rest const& rest, int64_t ctas,
                            Device const& device, cudaStream_t stream, bool independent = false) {
  sm90::Launch how{};
  how.threads = WorkListBuilder<Tiling, Call>::kThreads;
  how.grid = dim3(1 + static_cast<unsigned>(ctas));
  how.stream = stream;
  how.device = device.index;
  how.early = may_start_early(device);
  return sm90::launch_kernel<prepare_kernel<Tiling, Call, Rest>>(how, call, list, rest,
                                                                 independent);
}

/// The rest is to clear unused rows.
template <class Tiling, class Call>
cudaError_t start_preparing(Call const& call, WorkList const& list, UnusedRows const& unused,
                            Device const& device, cudaStream_t stream, bool independent = false) {
  PackedLengths const& packed = attention_call(call).packed;
  ClearUnused const clear{{packed.cu_seqlens_q, packed.seqused_q, packed.total_q, sequences(call)},
                          unused};
  constexpr int kThreads = WorkListBuilder<Tiling, Call>::kThreads;
  int64_t const rows = attention_call(call).is_packed() ? packed.total_q : 0;
  int64_t const ctas = (rows + kThreads - 1) / kThreads;
  return start_preparing<Tiling>(call, list, clear,
                                 ctas < device.multiprocessors ? ctas : device.multiprocessors,
                                 device, stream, independent);
}

}  // namespace cute_kernels::attention
