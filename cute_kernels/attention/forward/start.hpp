#pragma once

#include <algorithm>
#include <cstdint>

#include "cute_kernels/attention/forward/calls.hpp"
#include "cute_kernels/attention/forward/epilogue.hpp"
#include "cute_kernels/attention/forward/kernel.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/schedule/prepare.hpp"
#include "cute_kernels/attention/variant/listed_call.hpp"
#include "cute_kernels/attention/variant/shared_mask.hpp"
#include "cute_kernels/sm90/launch.hpp"

// What the launches of 16-bit and FP8 forward kernels have in common.
namespace cute_kernels::attention {

/// How many tiles a work list of the call may have.
template <class Traits>
int64_t most_work(AttentionCall const& call) {
  return most_tiles(call, Traits::kTileM);
}

template <class Traits>
WorkList forward_work_list(ForwardProblem const& problem) {
  return work_list_at(problem.workspace, problem.call.sizes.batch, most_work<Traits>(problem.call));
}

/// The memory of the work list that a launch needs.
template <class Traits>
int64_t work_bytes(ForwardProblem const& problem) {
  if constexpr (!Traits::kAnyCall) return 0;
  return work_list_bytes(problem.call.sizes.batch, most_work<Traits>(problem.call));
}

/// That of what a mask hook shows all heads, behind it.
template <class Traits>
int64_t shared_mask_bytes(ForwardProblem const& problem) {
  return bytes_of_shared_mask<typename Traits::Variant, Traits::kTileN>(problem.call,
                                                                        problem.variant);
}

/// Null: tiles ask for themselves.
template <class Traits>
uint32_t* shared_mask_of(ForwardProblem const& problem) {
  if (shared_mask_bytes<Traits>(problem) == 0) return nullptr;
  return reinterpret_cast<uint32_t*>(static_cast<char*>(problem.workspace) +
                                     work_bytes<Traits>(problem));
}

/// Starts the kernel that runs before one that takes any call; `independent`: see start_preparing.
template <class Traits>
cudaError_t start_listing_work(ForwardProblem const& problem, cudaStream_t stream,
                               bool independent = false) {
  CallSizes const& sizes = problem.call.sizes;
  int64_t const row_bytes =
      int64_t{sizeof(typename Traits::Output)} * sizes.heads_q * sizes.head_dim_v;
  UnusedRows const unused{problem.out.data, row_bytes, problem.lse, sizes.heads_q,
                          tensor_rows_q(problem.call)};
  auto start = [&](auto const& call) {
    return start_preparing<typename Traits::Tiling>(call, forward_work_list<Traits>(problem),
                                                    unused, problem.device, stream, independent);
  };
  using Variant = typename Traits::Variant;
  if constexpr (Variant::kHasBlockMask) {
    BlockLists const& lists = problem.variant->blocks;
    ListedCall const listed = listed_call(problem.call, lists);
    if constexpr (shares_mask<Variant>()) {
      if (uint32_t* const words = shared_mask_of<Traits>(problem)) {
        using Builder = WorkListBuilder<typename Traits::Tiling, ListedCall>;
        static_assert(SharedMask<Traits::kTileN>::kThreads == Builder::kThreads);
        AskMask<Variant, Traits::kTileN> const ask(problem.call, *problem.variant, words);
        return start_preparing<typename Traits::Tiling>(listed, forward_work_list<Traits>(problem),
                                                        ask, ask.ctas(), problem.device, stream,
                                                        independent);
      }
    }
    return start(listed);
  } else {
    return start(problem.call);
  }
}

/// What the kernel is told of the call.
template <class Traits>
typename Traits::Calls forward_calls(ForwardProblem const& problem) {
  AttentionCall const& call = problem.call;
  CallSizes const& sizes = call.sizes;
  typename Traits::Calls calls{};
  if constexpr (Traits::kAnyCall) {
    calls.scheduler =
        Traits::Calls::Scheduler::make_params(forward_work_list<Traits>(problem), sizes.heads_q);
    calls.sinks = call.sinks;
  } else {
    int64_t const kv_bytes = int64_t{sizeof(typename Traits::ElementQk)} * sizes.batch *
                             sizes.heads_kv * sizes.seqlen_k * (sizes.head_dim + sizes.head_dim_v);
    calls.mask = Mask{*kernel_ranges(call)};  // the row can_take() the call
    calls.scheduler = TileScheduler::make_params(sizes, calls.mask.causal, Traits::kTileM, kv_bytes,
                                                 problem.device.multiprocessors);
  }
  return calls;
}

/// The parameters of every forward kernel: TMA descriptors, mask, order of the tiles. scale_log2
/// takes products to scores in powers of two.
template <class Traits>
auto forward_params(ForwardProblem const& problem, float scale_log2) {
  using namespace cute;
  AttentionCall const& call = problem.call;
  CallSizes const& sizes = call.sizes;
  int const batch = tensor_batch(call), queries = tensor_rows_q(call);
  // A descriptor of no keys is not allowed; without any nothing is loaded through it.
  int const keys = std::max(1, tensor_rows_k(call));
  auto q = global_tensor<typename Traits::ElementQk>(problem.q, queries, sizes.head_dim,
                                                     sizes.heads_q, batch);
  auto k = global_tensor<typename Traits::ElementQk>(problem.k, keys, sizes.head_dim,
                                                     sizes.heads_kv, batch);
  auto v = Traits::value_tensor(problem.v, call, keys);
  auto o = global_tensor<typename Traits::Output>(problem.out, queries, sizes.head_dim_v,
                                                  sizes.heads_q, batch);
  auto tma_q = make_tma_copy(SM90_TMA_LOAD{}, q, typename Traits::LayoutQ{});
  auto tma_k = make_tma_copy(SM90_TMA_LOAD{}, k, take<0, 2>(typename Traits::LayoutK{}));
  auto tma_v = make_tma_copy(SM90_TMA_LOAD{}, v, typename Traits::LayoutValueLoad{});
  auto tma_o = make_tma_copy(SM90_TMA_STORE{}, o, typename Traits::LayoutO{});

  using Params =
      ForwardParams<Traits, decltype(tma_q), decltype(tma_k), decltype(tma_v), decltype(tma_o)>;
  Params params{};
  static_cast<typename Traits::Calls&>(params) = forward_calls<Traits>(problem);
  params.tma_q = tma_q;
  params.tma_k = tma_k;
  params.tma_v = tma_v;
  params.tma_o = tma_o;
  params.shape_q = q.shape();
  params.shape_k = k.shape();
  params.shape_v = v.shape();
  params.shape_o = o.shape();
  params.v = problem.v;
  params.out = problem.out;
  params.lse = problem.lse;
  params.scale_log2 = scale_log2;
  params.heads = sizes.heads_q;
  params.heads_per_kv = cutlass::FastDivmod(sizes.heads_q / sizes.heads_kv);
  params.variant = Traits::Variant::arguments_of(problem);
  return params;
}

/// Starts a forward kernel, a CTA for each multiprocessor or for each tile that there may be. With
/// `overlaps` while the kernel before it on the stream ends: then it waits for that one itself.
template <class Mainloop, class Params>
cudaError_t start_forward(Params const& params, ForwardProblem const& problem, cudaStream_t stream,
                          bool overlaps = false) {
  using Traits = typename Mainloop::Traits;
  int64_t const multiprocessors = problem.device.multiprocessors;
  int64_t const tiles =
      std::max(int64_t{1}, most_work<Traits>(problem.call) * problem.call.sizes.heads_q);
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory");
  sm90::Launch how{};
  how.grid = dim3(static_cast<unsigned>(std::min(tiles, multiprocessors)));
  how.threads = Traits::kThreads;
  how.stream = stream;
  how.device = problem.device.index;
  how.shared_bytes = kSharedBytes;
  how.early = overlaps;
  constexpr auto kKernel =
      forward_kernel<Mainloop, TileProducer<Mainloop>, ForwardEpilogue<Traits>, Params>;
  return sm90::launch_kernel<kKernel>(how, params);
}

}  // namespace cute_kernels::attention
