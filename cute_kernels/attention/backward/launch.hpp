#pragma once

#include <algorithm>
#include <atomic>
#include <random>
#include <type_traits>

#include "cute_kernels/attention/backward/kernel.hpp"
#include "cute_kernels/attention/backward/postprocess.hpp"
#include "cute_kernels/attention/backward/preprocess.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/softmax_scale.hpp"
#include "cute_kernels/sm90/launch.hpp"

namespace cute_kernels::attention {

/// A number that memory nobody has written holds by chance once in 2^64 calls.
inline uint64_t number_of_call() {
  static std::atomic<uint64_t> next = std::random_device{}() * uint64_t{0x9e3779b97f4a7c15};
  return next.fetch_add(0xd1342543de82ef95, std::memory_order_relaxed);
}

template <class Tile>
int64_t backward_workspace_bytes(BackwardProblem const& problem) {
  return backward_workspace<BackwardTraits<Tile>>(problem).bytes;
}

/// How many pairs of batch entry and KV head are worked on together. A few are enough to mix a
/// causal mask's long CTAs with short ones. Where dQ is added in order, a CTA waits for those with
/// the key blocks before, and the more heads, the fewer of these start with it; but what CTAs touch
/// between the first and the last of a query block's should stay in L2. Measured.
template <class Traits>
int heads_at_a_time(AttentionCall const& call, BackwardWorkspace const& workspace) {
  if (workspace.turns == nullptr) return 4;
  int heads = 16 / Traits::kCluster;
  if constexpr (Traits::kLongSteps) {
    if (call.mask.right) heads *= 2;
    if (workspace.m_blocks.divisor <= 8) heads *= 2;
  }
  return heads;
}

/// Of batch entries and KV heads.
inline int pairs_of(AttentionCall const& call) { return call.sizes.heads_kv * tensor_batch(call); }

template <class Traits>
int group_of_pairs(AttentionCall const& call, BackwardWorkspace const& workspace) {
  return std::min(pairs_of(call), heads_at_a_time<Traits>(call, workspace));
}

/// Whether the main kernel clears dQ of all groups of heads but the first. Of packed sequences some
/// numbers of key blocks have no keys, and nobody who clears. Nor where so many queries are beside
/// so few keys that a few warps would clear what preprocess clears with the whole GPU.
template <class Traits>
bool clears_ahead(AttentionCall const& call, BackwardWorkspace const& workspace) {
  constexpr int kMostBlocks = 256;  // of a share
  if (!Traits::kPersistent || workspace.turns != nullptr || call.is_packed()) return false;
  int64_t const clusters = key_block_numbers(call, Traits::kTileN * Traits::kCluster);
  int64_t const blocks =
      int64_t{workspace.m_blocks.divisor} * (call.sizes.heads_q / call.sizes.heads_kv);
  return clusters > 0 && blocks <= kMostBlocks * clusters &&
         group_of_pairs<Traits>(call, workspace) < pairs_of(call);
}

/// How many of the main kernel's CTAs are launched at a time. Those that do not stay are launched
/// all at once, but where other work has multiprocessors of its own: then as many as may run. The
/// careful kernel's have nothing to do in most calls.
template <class Traits>
int main_grid(int ctas, Device const& device, bool careful) {
  if (!Traits::kPersistent && (careful || !device.is_shared)) return ctas;
  int const clusters = std::max(1, device.multiprocessors / Traits::kCluster);
  return std::min(ctas, clusters * Traits::kCluster);
}

/// The main kernel: dK and dV, and dQ added up in the workspace. Careful, it only does so in a call
/// that has raised the alarm.
template <class Traits, bool kCareful>
cudaError_t launch_backward_main(BackwardProblem const& problem, BackwardWorkspace const& workspace,
                                 uint64_t call_number, cudaStream_t stream) {
  using namespace cute;
  using Element = typename Traits::Element;
  AttentionCall const& call = problem.call;
  CallSizes const& sizes = call.sizes;
  auto tensor = [&](TensorView const& view, int rows, int channels, int heads) {
    if constexpr (Traits::kAnyCall) {
      return any_tensor<Element>(view, rows, channels, heads, sizes.batch, call.is_packed());
    } else {
      return global_tensor<Element>(view, rows, channels, heads, sizes.batch);
    }
  };
  int const rows_q = tensor_rows_q(call), rows_k = tensor_rows_k(call);
  auto queries = [&](TensorView const& view, int channels, auto layout) {
    return make_tma_copy(SM90_TMA_LOAD{}, tensor(view, rows_q, channels, sizes.heads_q),
                         take<0, 2>(layout));
  };
  auto keys = [&](auto operation, TensorView const& view, int channels, auto layout) {
    return make_tma_copy(operation, tensor(view, rows_k, channels, sizes.heads_kv), layout);
  };
  auto const tma_q = queries(problem.q, sizes.head_dim, typename Traits::LayoutQ{});
  auto const tma_grad_out =
      queries(problem.grad_out, sizes.head_dim_v, typename Traits::LayoutGradOut{});
  auto const tma_k = keys(SM90_TMA_LOAD{}, problem.k, sizes.head_dim, typename Traits::LayoutK{});
  auto const tma_v = keys(SM90_TMA_LOAD{}, problem.v, sizes.head_dim_v, typename Traits::LayoutV{});
  // Floats do not go by TMA, but a descriptor must be one.
  bool const by_tma = !problem.float_grads;
  auto const tma_dk = keys(SM90_TMA_STORE{}, by_tma ? problem.grad_k : problem.k, sizes.head_dim,
                           typename Traits::LayoutDk{});
  auto const tma_dv = keys(SM90_TMA_STORE{}, by_tma ? problem.grad_v : problem.v, sizes.head_dim_v,
                           typename Traits::LayoutDv{});
  constexpr int kClusterKeys = Traits::kTileN * Traits::kCluster;
  int const clusters = key_block_numbers(call, kClusterKeys);
  int const pairs = pairs_of(call);
  using Params =
      BackwardParams<Traits, std::decay_t<decltype(tma_q)>, std::decay_t<decltype(tma_grad_out)>,
                     std::decay_t<decltype(tma_k)>, std::decay_t<decltype(tma_v)>,
                     std::decay_t<decltype(tma_dk)>, std::decay_t<decltype(tma_dv)>>;
  Params params{};
  params.tma_q = tma_q;
  params.tma_grad_out = tma_grad_out;
  params.tma_k = tma_k;
  params.tma_v = tma_v;
  params.tma_dk = tma_dk;
  params.tma_dv = tma_dv;
  params.shape_q = tensor(problem.q, rows_q, sizes.head_dim, sizes.heads_q).shape();
  params.shape_k = tensor(problem.k, rows_k, sizes.head_dim, sizes.heads_kv).shape();
  params.grad_out = problem.grad_out;
  params.float_grads = problem.float_grads;
  params.grad_k = problem.grad_k;
  params.grad_v = problem.grad_v;
  params.workspace = workspace;
  params.call_number = call_number;
  params.scale_log2 = scale_of_scores(Traits::Variant::unit(call)) * sm90::kLog2e;
  params.variant = Traits::Variant::arguments_of(problem);
  if constexpr (Traits::kSharesMask) params.variant.shared_mask = workspace.shared_mask;
  params.softmax_scale = problem.call.scale;
  params.heads = sizes.heads_q;
  params.head_dim = sizes.head_dim;
  params.head_dim_v = sizes.head_dim_v;
  params.heads_per_kv = sizes.heads_q / sizes.heads_kv;
  params.dq_in_order = workspace.turns != nullptr;
  if constexpr (Traits::kAnyCall) {
    params.masks = call;
  } else {
    params.masks = Mask{*kernel_ranges(call)};  // the row can_take() the call
  }
  params.clusters = clusters;
  params.pairs = pairs;
  params.group = group_of_pairs<Traits>(call, workspace);
  params.clears_ahead = clears_ahead<Traits>(call, workspace);
  params.heads_kv = cutlass::FastDivmod(sizes.heads_kv);

  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory");
  int const ctas = clusters * pairs * Traits::kCluster;
  int const grid = main_grid<Traits>(ctas, problem.device, kCareful);
  sm90::Launch how{};
  how.threads = Traits::kThreads;
  how.stream = stream;
  how.device = problem.device.index;
  how.shared_bytes = kSharedBytes;
  how.cluster = Traits::kCluster;
  how.early = !kCareful || may_start_early(problem.device);
  if constexpr (Traits::kPersistent) {
    how.grid = dim3(grid);
    return sm90::launch_kernel<backward_kernel<Traits, kCareful, Params>>(how, params);
  }
  cudaError_t status = cudaSuccess;
  for (; params.first_number < ctas && status == cudaSuccess; params.first_number += grid) {
    how.grid = dim3(std::min(grid, ctas - params.first_number));
    status = sm90::launch_kernel<backward_kernel<Traits, kCareful, Params>>(how, params);
    how.early = false;
  }
  return status;
}

/// All CTAs of an AskMask.
template <class Ask>
__global__ void __launch_bounds__(Ask::kThreads) ask_mask_kernel(CUTE_GRID_CONSTANT Ask const ask) {
  sm90::let_next_kernel_start();
  ask(blockIdx.x, gridDim.x, blockDim.x);
}

/// Starts the kernel that asks a mask hook for all heads, if the call has memory for what it says.
template <class Traits>
cudaError_t start_asking(BackwardProblem const& problem, BackwardWorkspace const& workspace,
                         cudaStream_t stream) {
  if constexpr (Traits::kSharesMask) {
    if (workspace.shared_mask == nullptr) return cudaSuccess;
    using Ask = AskMask<typename Traits::Variant, Traits::kTileM, MaskRows::kKeys>;
    Ask const ask(problem.call, *problem.variant, workspace.shared_mask);
    sm90::Launch how{};
    how.grid = dim3(static_cast<unsigned>(ask.ctas()));
    how.threads = Ask::kThreads;
    how.stream = stream;
    how.device = problem.device.index;
    return sm90::launch_kernel<ask_mask_kernel<Ask>>(how, ask);
  }
  return cudaSuccess;
}

/// Starts the backward kernels of a tile on `stream`: rows' statistics, gradients, dQ's rounding.
/// Asynchronous.
template <class Tile>
cudaError_t launch_backward(BackwardProblem const& problem, cudaStream_t stream) {
  using Traits = BackwardTraits<Tile>;
  BackwardWorkspace const workspace = backward_workspace<Traits>(problem);
  AttentionCall const& call = problem.call;
  CallSizes const& sizes = call.sizes;
  if (Traits::Variant::kHasBlockMask && !has_block_lists(problem)) return cudaErrorInvalidValue;
  uint64_t const call_number = number_of_call();
  typename Traits::CallOfSequences of_sequences{};
  if constexpr (Traits::kAnyCall) of_sequences = call;
  sm90::Launch of_queries{};
  of_queries.grid = dim3(workspace.m_blocks.divisor * sizes.heads_q * tensor_batch(call));
  of_queries.stream = stream;
  of_queries.device = problem.device.index;

  // Changed scores meet the lse in powers of two.
  float const unit_of_lse = Traits::kChanges ? sm90::kLn2 : scale_of_scores(call.scale);
  int const rows = tensor_batch(call) * sizes.heads_q;
  int const rows_to_clear =
      clears_ahead<Traits>(call, workspace)
          ? group_of_pairs<Traits>(call, workspace) * (sizes.heads_q / sizes.heads_kv)
          : rows;
  cudaError_t status = start_asking<Traits>(problem, workspace, stream);
  if (status != cudaSuccess) return status;
  of_queries.threads = kPreprocessThreads;
  of_queries.early = workspace.shared_mask != nullptr && may_start_early(problem.device);
  status = sm90::launch_kernel<preprocess_kernel<Traits>>(
      of_queries,
      PreprocessParams<Traits>{problem.q, problem.out, problem.grad_out, problem.lse,
                               problem.grad_lse, problem.sinks, tensor_rows_q(call),
                               cutlass::FastDivmod(sizes.heads_q), sizes.head_dim, sizes.head_dim_v,
                               unit_of_lse, rows_to_clear, call_number, workspace, of_sequences});
  if (status != cudaSuccess) return status;

  if (tensor_rows_k(call) > 0) {  // otherwise dQ = 0
    status = launch_backward_main<Traits, false>(problem, workspace, call_number, stream);
    if (status != cudaSuccess) return status;
    BackwardWorkspace again = workspace;  // in order: who comes first writes over what is there
    again.turns = workspace.careful_turns;
    again.drawn = workspace.careful_drawn;
    status = launch_backward_main<Traits, true>(problem, again, call_number, stream);
    if (status != cudaSuccess) return status;
  }

  of_queries.threads = cutlass::NumThreadsPerWarpGroup * Traits::kDqSlices;
  of_queries.shared_bytes = postprocess_shared_bytes<Traits>();
  of_queries.early = true;
  status = sm90::launch_kernel<postprocess_kernel<Traits>>(
      of_queries, PostprocessParams<Traits>{problem.grad_q, problem.float_grads,
                                            problem.adds_to_grad_q, call.scale, tensor_rows_q(call),
                                            sizes.head_dim, cutlass::FastDivmod(sizes.heads_q),
                                            call_number, workspace, of_sequences});
  if (status != cudaSuccess || problem.sinks == nullptr) return status;
  return launch_sinks(problem, workspace, stream);
}

}  // namespace cute_kernels::attention
