#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/decode/fp8_tile_config.hpp"
#include "cute_kernels/attention/latent/tile_config.hpp"
#include "cute_kernels/attention/prefill/tile_config.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/eight_bits.hpp"
#include "cute_kernels/torch/require.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {
namespace {

using attention::CachedCall;
using attention::CacheKernels;
using attention::CachePages;
using attention::CacheView;
using attention::CallSizes;
using attention::DecodeProblem;
using attention::EightBits;
using attention::Fp8DecodeProblem;
using attention::LatentKernel;
using attention::LatentProblem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What is refused here is refused in few words: the checks in Python then say what is wrong.
constexpr int64_t kMostKeys = 1 << 30;  // of a sequence

void check_sizes(Argument const& a, size_t rank) {
  require(a.sizes.size() == rank, a.name, " does not have ", rank, " dimensions");
  for (int64_t size : a.sizes) {
    require(size <= std::numeric_limits<int>::max(), a.name, " has a size of 2^31 or more");
  }
}

int bytes_of_element(Argument const& a) { return is_8_bits(a.dtype) ? 1 : kElementBytes; }

/// Kernels count the vectors of 16 bytes before a row in 32 bits (decode/cache_rows.hpp).
void check_span(Argument const& a) {
  constexpr int64_t kMostBytes = (int64_t{1} << 36) - 16;
  int64_t last = 0;
  for (size_t dim = 0; dim < a.sizes.size(); ++dim) {
    last += std::max<int64_t>(0, a.sizes[dim] - 1) * a.strides[dim];
  }
  require(last < kMostBytes / bytes_of_element(a), a.name, " spans 64 GiB or more");
}

/// `most`: of the head_dim.
void check_cache(Argument const& a, Argument const& q, int most = kMaxHeadDim) {
  int const bytes = bytes_of_element(a);
  check_device(a, q);
  check_sizes(a, 4);
  check_head_dim(a.name, a.size(3), most);
  require(bytes > 1 || a.size(3) % 16 == 0, a.name, "'s head_dim is not a multiple of 16");
  require(a.tensor.numel() == 0 || suits_tma(a, bytes), a.name,
          "'s address or strides are not multiples of 16 bytes, or its head_dim is not contiguous");
  check_span(a);
}

/// Different in each call of the process, and in those of others.
uint64_t next_ticket() {
  static std::atomic<uint64_t> ticket = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return ticket.fetch_add(1, std::memory_order_relaxed);
}

/// Numbers on q's device, with these sizes; -1 is any. Null where there is no tensor.
template <class Number>
Number const* numbers(char const* name, std::optional<Tensor> const& tensor, Argument const& q,
                      std::initializer_list<int64_t> sizes) {
  if (!tensor) return nullptr;
  Argument const a(name, *tensor);
  check_device(a, q);
  constexpr bool kIsFloat = std::is_same_v<Number, float>;
  require(a.dtype == (kIsFloat ? ScalarType::Float : ScalarType::Int), name, " is not ",
          kIsFloat ? "float32" : "int32");
  check_sizes(a, sizes.size());
  int dim = 0;
  for (int64_t size : sizes) {
    require(size < 0 || a.size(dim) == size, name, " does not have ", size, " elements");
    ++dim;
  }
  require(a.sizes.back() <= 1 || a.strides.back() == 1, name, " is not contiguous");
  return static_cast<Number const*>(tensor->data_ptr());
}

CacheView cache_view(Argument const& a) {
  return {a.tensor.data_ptr(), a.stride(0), a.stride(1), a.stride(2)};
}

CachePages cache_pages(Argument const& q, Argument const& k, int64_t batch,
                       std::optional<Tensor> const& page_table,
                       std::optional<Tensor> const& cache_batch_idx) {
  require(!page_table || !cache_batch_idx, "page_table and cache_batch_idx are both given");
  CachePages pages{};
  pages.table = numbers<int>("page_table", page_table, q, {batch, -1});
  pages.entries = numbers<int>("cache_batch_idx", cache_batch_idx, q, {batch});
  pages.pages = static_cast<int>(k.size(0));
  pages.page_size = static_cast<int>(std::max<int64_t>(1, k.size(1)));
  pages.pages_of_sequence = 1;
  if (page_table) {
    require(k.size(1) > 0, "k_cache has pages without rows");
    pages.table_stride = page_table->sizes()[0] > 1 ? page_table->strides()[0] : 0;
    pages.pages_of_sequence = static_cast<int>(page_table->sizes()[1]);
  } else {
    require(cache_batch_idx || k.size(0) == batch,
            "k_cache does not have an entry for each sequence");
  }
  return pages;
}

/// Which of a pass's kernels there are, for a message.
template <class Kernel>
[[noreturn]] void fail_without_kernel(attention::KernelTable<Kernel> const& kernels,
                                      ScalarType dtype, CachedCall const& call) {
  std::ostringstream there;
  for (Kernel const& kernel : kernels) there << ' ' << kernel.config.name;
  fail("no decode kernel for caches of ", DtypeOf{dtype}, " and head_dim ",
       std::max(call.head_dim, call.head_dim_v), " in this build, which has", there.str());
}

template <class Kernel>
void check_blocks(Kernel const& kernel, CachedCall const& call) {
  require(attention::most_blocks(call, kernel.config.tile_m, kernel.config.tile_n) <=
              attention::kMostBlocks,
          "q and the cache have too many blocks for one call: pass fewer queries at a time");
}

/// A call's kernels. Of `longest`, which the caller knows or not, no sequence has more queries.
CacheKernels kernels_for(ScalarType dtype, DecodeProblem const& problem,
                         std::optional<int64_t> longest) {
  CachedCall const& call = problem.call;
  CacheKernels const kernels = attention::choose_for_cache(element_type(dtype), problem, longest);
  if (kernels.decode == nullptr && kernels.prefill == nullptr) {
    fail_without_kernel(attention::decode_kernels, dtype, call);
  }
  if (kernels.decode != nullptr) check_blocks(*kernels.decode, call);
  return kernels;
}

/// Launches a kernel with a workspace of its own, which lives until the launch is enqueued: the
/// allocator reuses memory in stream order.
template <class Kernel>
void launch(Kernel const& kernel, typename Kernel::Problem& problem) {
  int const device = problem.device.index;
  Tensor const workspace = empty({kernel.workspace_bytes(problem)}, ScalarType::Byte, device);
  problem.workspace = workspace.data_ptr();
  require_success(kernel.launch(problem, current_stream(device)), kernel.config.name);
}

/// Sequences of many queries and of few have kernels of their own.
void launch_all(CacheKernels const& kernels, DecodeProblem& problem) {
  CachedCall& call = problem.call;
  if (kernels.prefill != nullptr) {
    if (kernels.decode != nullptr) call.least_rows = CacheKernels::kLeastRows;
    launch(*kernels.prefill, problem);
    call.least_rows = 0;
  }
  if (kernels.decode != nullptr) {
    if (kernels.prefill != nullptr) call.most_rows = CacheKernels::kLeastRows - 1;
    launch(*kernels.decode, problem);
  }
}

/// To a cache of 8 bits of this dtype. No sequence has more than `longest` queries, if given.
void launch_eight_bits(ScalarType dtype, Fp8DecodeProblem& problem,
                       std::optional<int64_t> longest) {
#ifdef CUTE_KERNELS_FP8
  auto const& kernels = attention::fp8_decode_kernels;
  int64_t const rows = attention::rows_of_longest(problem.call, longest);
  auto const* const kernel =
      attention::choose_fp8_decode(kernels, problem.call, rows, attention::mean_rows(problem.call));
  if (kernel == nullptr) fail_without_kernel(kernels, dtype, problem.call);
  check_blocks(*kernel, problem.call);
  launch(*kernel, problem);
#else
  fail("this build has no kernels for caches of ", DtypeOf{dtype}, " (CUTE_KERNELS_FP8=OFF)");
#endif
}

/// Scores are those of q and k, and of qv and v.
void launch_latent(ScalarType dtype, DecodeProblem const& of_q, Tensor const& qv) {
  LatentProblem problem{of_q, view(qv)};
  LatentKernel const* const kernel = attention::choose_latent(element_type(dtype), problem.call);
  require(kernel != nullptr, "no latent kernel for ", DtypeOf{dtype}, " in this build");
  divide_key_heads(problem, kernel->config.tile_m);
  check_blocks(*kernel, problem.call);
  launch(*kernel, problem);
}

/// The queries of values that are keys too, checked.
void check_latent(Argument const& qv, Argument const& q, Argument const& v) {
  require(!is_8_bits(v.dtype), "qv is given with a cache of 8 bits");
  require(q.size(2) <= kMaxRopeDim, "q has a head_dim above ", kMaxRopeDim, " with qv");
  check_like(qv, q);
  check_sizes(qv, 3);
  require(qv.size(0) == q.size(0) && qv.size(1) == q.size(1) && qv.size(2) == v.size(3),
          "qv does not have q's rows and heads, and v_cache's head_dim");
  require(qv.stride(2) == 1 || qv.size(2) == 1, "qv's head_dim is not contiguous");
  check_span(qv);
}

attention::QueryType query_type(ScalarType dtype) {
  if (dtype == ScalarType::Half) return attention::QueryType::kFloat16;
  if (dtype == ScalarType::BFloat16) return attention::QueryType::kBFloat16;
  return attention::QueryType::kE4m3;
}

/// What attention to e4m3 queries is written in, and to others.
ScalarType output_type(ScalarType dtype) {
  return dtype == ScalarType::Float8_e4m3fn ? ScalarType::BFloat16 : dtype;
}

Tensor flash_attn_kvcache_forward_out(
    Tensor const& out_tensor, Tensor const& q_tensor, Tensor const& k_cache, Tensor const& v_cache,
    Tensor const& cu_seqlens_q, Tensor const& cache_seqlens, std::optional<Tensor> page_table,
    std::optional<Tensor> cache_batch_idx, std::optional<Tensor> cache_leftpad,
    std::optional<Tensor> sinks, double softmax_scale, bool causal, std::optional<Tensor> q_descale,
    std::optional<Tensor> k_descale, std::optional<Tensor> v_descale,
    std::optional<Tensor> tree_mask, std::optional<Tensor> qv, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
    int64_t num_splits, int64_t sm_margin, std::optional<int64_t> rotation_seed,
    int64_t attention_chunk) {
  Argument const q("q", q_tensor), k("k_cache", k_cache), v("v_cache", v_cache);
  require(q.is_cuda, "q is not on CUDA");
  bool const eight_bits = is_8_bits(k.dtype);
  require(q.dtype == ScalarType::Half || q.dtype == ScalarType::BFloat16 ||
              (eight_bits && q.dtype == ScalarType::Float8_e4m3fn),
          "q is not float16 or bfloat16");
  require(eight_bits || k.dtype == q.dtype, "k_cache does not have q's dtype");
  require(v.dtype == k.dtype, "v_cache does not have k_cache's dtype");
  require(eight_bits || (!q_descale && !k_descale && !v_descale && !rotation_seed),
          "descales or rotation_seed are given with a cache of 16 bits");
  check_sizes(q, 3);
  check_head_dim("q", q.size(2));
  require(q.stride(2) == 1, "q's head_dim is not contiguous");
  check_span(q);
  check_cache(k, q);
  check_cache(v, q, qv ? kMaxLatentDim : kMaxHeadDim);
  require(k.size(3) == q.size(2), "k_cache does not have q's head_dim");
  if (qv) check_latent(Argument("qv", *qv), q, v);
  for (int dim = 0; dim < 3; ++dim) {
    require(v.size(dim) == k.size(dim), "v_cache does not have k_cache's pages, slots and heads");
  }
  CallSizes const sizes = sizes_of(q.size(1), k.size(2), q.size(2), v.size(3));
  require(q.size(0) * sizes.heads_q <= std::numeric_limits<int>::max(), "q has 2^31 rows or more");
  require(num_splits >= 0, "num_splits is below 0");
  require(!max_seqlen_q || *max_seqlen_q >= 0, "max_seqlen_q is below 0");
  Argument const out("out", out_tensor);
  check_device(out, q);
  require(out.dtype == output_type(q.dtype), "out does not have the output's dtype");
  check_sizes(out, 3);
  require(out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == v.size(3),
          "out does not have the output's shape");
  require(out_tensor.is_contiguous() && suits_tma(out, kElementBytes),
          "out is not contiguous, or its address not a multiple of 16 bytes");

  int64_t const batch = cache_seqlens.numel();
  Fp8DecodeProblem problem{};
  problem.pages = cache_pages(q, k, batch, page_table, cache_batch_idx);
  problem.num_splits = static_cast<int>(std::min<int64_t>(num_splits, kMostKeys));
  problem.k = cache_view(k);
  problem.v = cache_view(v);
  problem.sinks = numbers<float>("sinks", sinks, q, {sizes.heads_q});
  problem.device = hopper(q.device, sm_margin);
  CachedCall& call = problem.call;
  call.batch = static_cast<int>(batch);
  call.total_q = static_cast<int>(q.size(0));
  call.heads_q = sizes.heads_q;
  call.heads_kv = sizes.heads_kv;
  call.group = sizes.heads_q / std::max(1, sizes.heads_kv);
  call.head_dim = sizes.head_dim;
  call.head_dim_v = sizes.head_dim_v;
  int64_t const most_keys = problem.pages.pages_of_sequence * k.size(1);
  require(most_keys <= kMostKeys, "a sequence's cache has room for more than 2^30 keys");
  call.most_keys = static_cast<int>(most_keys);
  call.mask = mask_of(causal, window_left, window_right, std::nullopt);
  call.scale = checked_scale(softmax_scale);
  call.softcap = checked_softcap(softcap);
  require(attention_chunk >= 0, "attention_chunk is below 0");
  call.chunk = static_cast<int>(std::min(attention_chunk, kMostKeys));
  call.lengths = {numbers<int>("cu_seqlens_q", cu_seqlens_q, q, {batch + 1}),
                  numbers<int>("cache_seqlens", cache_seqlens, q, {batch}),
                  numbers<int>("cache_leftpad", cache_leftpad, q, {batch})};
  if (tree_mask) {
    Argument const a("tree_mask", *tree_mask);
    check_device(a, q);
    require(a.dtype == ScalarType::Long && a.sizes.size() == 1 && a.size(0) == q.size(0) &&
                tree_mask->is_contiguous(),
            "tree_mask is not int64, (total_q,) and contiguous");
    call.tree_mask = static_cast<int64_t const*>(tree_mask->data_ptr());
  }
  EightBits& format = problem.format;
  format.is_int8 = k.dtype == ScalarType::Char;
  format.q_type = query_type(q.dtype);
  format.out_is_bfloat16 = out.dtype == ScalarType::BFloat16;
  read_scales("q_descale", q_descale, k, batch, format.q_of_sequence, nullptr);
  read_scales("k_descale", k_descale, k, batch, format.k_of_sequence, &format.k_of_row);
  read_scales("v_descale", v_descale, k, batch, format.v_of_sequence, &format.v_of_row);
  format.rotated = rotation_seed.has_value();
  if (rotation_seed) {
    require((call.head_dim & (call.head_dim - 1)) == 0, "head_dim is not a power of 2");
    format.signs = fp8::random_signs(static_cast<uint64_t>(*rotation_seed));
  }

  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Tensor lse = empty({sizes.heads_q, q.size(0)}, ScalarType::Float, q.device);
  if (lse.numel() == 0) return lse;
  // The copy, if any, lives until the launches are enqueued.
  Tensor const q_readable = tma_readable(q, bytes_of_element(q));
  problem.q = view(q_readable);
  problem.out = out_tensor.data_ptr();
  problem.lse = static_cast<float*>(lse.data_ptr());
  problem.ticket = next_ticket();
  if (qv) {
    Tensor const qv_readable = tma_readable(Argument("qv", *qv), kElementBytes);
    launch_latent(q.dtype, problem, qv_readable);
  } else if (eight_bits) {
    launch_eight_bits(k.dtype, problem, max_seqlen_q);
  } else {
    launch_all(kernels_for(q.dtype, problem, max_seqlen_q), problem);
  }
  return lse;
}

std::tuple<Tensor, Tensor> flash_attn_kvcache_forward(
    Tensor const& q_tensor, Tensor const& k_cache, Tensor const& v_cache,
    Tensor const& cu_seqlens_q, Tensor const& cache_seqlens, std::optional<Tensor> page_table,
    std::optional<Tensor> cache_batch_idx, std::optional<Tensor> cache_leftpad,
    std::optional<Tensor> sinks, double softmax_scale, bool causal, std::optional<Tensor> q_descale,
    std::optional<Tensor> k_descale, std::optional<Tensor> v_descale,
    std::optional<Tensor> tree_mask, std::optional<Tensor> qv, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
    int64_t num_splits, int64_t sm_margin, std::optional<int64_t> rotation_seed,
    int64_t attention_chunk) {
  Argument const q("q", q_tensor), v("v_cache", v_cache);
  require(q.is_cuda, "q is not on CUDA");
  check_sizes(q, 3);
  check_sizes(v, 4);
  torch::stable::accelerator::DeviceGuard const guard(q.device);
  Tensor out = empty({q.size(0), q.size(1), v.size(3)}, output_type(q.dtype), q.device);
  Tensor lse = flash_attn_kvcache_forward_out(
      out, q_tensor, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, cache_batch_idx,
      cache_leftpad, sinks, softmax_scale, causal, q_descale, k_descale, v_descale, tree_mask, qv,
      max_seqlen_q, window_left, window_right, softcap, num_splits, sm_margin, rotation_seed,
      attention_chunk);
  return {out, lse};
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("flash_attn_kvcache_forward",
               TORCH_BOX(&cute_kernels::binding::flash_attn_kvcache_forward));
  library.impl("flash_attn_kvcache_forward_out",
               TORCH_BOX(&cute_kernels::binding::flash_attn_kvcache_forward_out));
}
