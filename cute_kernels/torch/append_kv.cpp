#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/cache/launch.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/eight_bits.hpp"
#include "cute_kernels/torch/require.hpp"
#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What is refused here is refused in few words: Python's cache/checks.py then says what is wrong.
constexpr int64_t kMost = std::numeric_limits<int>::max();

void check_sizes(Argument const& a, size_t rank) {
  require(a.sizes.size() == rank, a.name, " does not have ", rank, " dimensions");
  for (int64_t size : a.sizes) require(size <= kMost, a.name, " has a size of 2^31 or more");
  int const last = static_cast<int>(rank) - 1;
  require(a.stride(last) == 1 || a.size(last) <= 1, a.name, "'s last dimension is not contiguous");
}

/// (count,) or (count, any) numbers on q's device; null if there are none.
int const* check_int32(char const* name, std::optional<Tensor> const& tensor, Argument const& like,
                       size_t rank, int64_t count) {
  if (!tensor) return nullptr;
  Argument const a(name, *tensor);
  check_device(a, like);
  require(a.dtype == ScalarType::Int, name, " is not int32");
  check_sizes(a, rank);
  require(a.size(0) == count, name, " does not have ", count, " rows");
  return static_cast<int const*>(tensor->data_ptr());
}

/// Dense tokens are (batch, seqlen, heads, head_dim), packed ones (total, heads, head_dim).
cache::Tokens tokens_of(Argument const& x, int64_t batch, std::optional<Tensor> const& cu_seqlens) {
  check_sizes(x, cu_seqlens ? 3 : 4);
  int const* const starts = check_int32("cu_seqlens", cu_seqlens, x, 1, batch + 1);
  cache::Tokens tokens{};
  tokens.batch = static_cast<int>(batch);
  tokens.cu_seqlens = starts;
  int64_t total = x.size(0);
  if (!starts) {
    require(x.size(0) == batch, x.name, " does not have batch ", batch);
    tokens.seqlen = static_cast<int>(x.size(1));
    total *= x.size(1);
  }
  require(total < kRowsLimit, x.name, " has 2^31 - 2^10 rows or more");
  tokens.total = static_cast<int>(total);
  return tokens;
}

cache::Rotary rotary_of(Tensor const& cos_tensor, Tensor const& sin_tensor, bool interleaved,
                        Argument const& x) {
  Argument const cos("rotary_cos", cos_tensor), sin("rotary_sin", sin_tensor);
  for (Argument const* table : {&cos, &sin}) {
    check_device(*table, x);
    check_sizes(*table, 2);
    require(table->dtype == ScalarType::Float || table->dtype == x.dtype, table->name,
            " is not float32 and not of ", x.name, "'s dtype");
  }
  require(sin.dtype == cos.dtype && sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1),
          "rotary_sin is not like rotary_cos");
  int64_t const pairs = cos.size(1);
  require(pairs % cache::kPairs == 0 && 2 * pairs <= x.sizes.back(),
          "rotary_cos does not have a multiple of ", cache::kPairs, " pairs within the head_dim");
  bool const is_float32 = cos.dtype == ScalarType::Float;
  int const bytes = is_float32 ? static_cast<int>(sizeof(float)) : kElementBytes;
  return {cos_tensor.data_ptr(),
          sin_tensor.data_ptr(),
          cos.stride(0),
          sin.stride(0),
          static_cast<int>(cos.size(0)),
          static_cast<int>(pairs),
          interleaved,
          is_float32,
          suits_tma(cos, bytes) && suits_tma(sin, bytes)};
}

int bytes_of(ScalarType dtype) { return is_8_bits(dtype) ? 1 : kElementBytes; }

/// `most`: of the head_dim.
cache::Rows rows_of(Argument const& from, Argument const& to, int64_t most = kMaxHeadDim) {
  int64_t const head_dim = from.sizes.back();
  check_head_dim(from.name, head_dim, most);
  return {view(from.tensor),
          view(to.tensor),
          suits_tma(from, bytes_of(from.dtype)),
          suits_tma(to, bytes_of(to.dtype)),
          static_cast<int>(from.size(static_cast<int>(from.sizes.size()) - 2)),
          static_cast<int>(head_dim)};
}

/// Rows of 8 bits, which are moved as they are, as rows of half as many numbers of 16 bits.
cache::Rows in_pairs(cache::Rows rows, Argument const& from, Argument const& to) {
  for (Argument const* a : {&from, &to}) {
    require(reinterpret_cast<uintptr_t>(a->tensor.data_ptr()) % kElementBytes == 0, a->name,
            "'s address is odd");
  }
  for (attention::TensorView* view : {&rows.from, &rows.to}) {
    for (int64_t* stride : {&view->batch_stride, &view->seqlen_stride, &view->head_stride}) {
      require(*stride % kElementBytes == 0, from.name, " or ", to.name, " has an odd stride");
      *stride /= kElementBytes;
    }
  }
  rows.head_dim /= kElementBytes;
  return rows;
}

cache::Rows rows_to_append(Argument const& from, Argument const& to, Argument const& k,
                           int64_t most = kMaxHeadDim) {
  check_like(from, k);
  check_device(to, k);
  bool const stored = is_8_bits(k.dtype);
  require(to.dtype == k.dtype || (is_8_bits(to.dtype) && !stored), to.name,
          " does not have k's dtype");
  check_sizes(to, 4);
  cache::Rows const rows = rows_of(from, to, most);
  require(!is_8_bits(to.dtype) || rows.head_dim % 16 == 0, to.name,
          "'s head_dim is not a multiple of 16");
  require(to.size(2) == rows.heads && to.size(3) == rows.head_dim, from.name,
          " does not have the heads and head_dim of ", to.name);
  return stored ? in_pairs(rows, from, to) : rows;
}

struct FactorNames {
  char const* descale;
  char const* scales;
};

/// Of K's or V's rows: given, or to be written.
cache::Factors factors_of(FactorNames names, std::optional<Tensor> const& descale,
                          std::optional<Tensor> const& scales, Argument const& k_cache,
                          int64_t batch) {
  require(!(descale && scales), names.descale, " and ", names.scales, " are both given");
  cache::Factors factors{};
  read_scales(names.descale, descale, k_cache, batch, factors.of_sequence, &factors.of_row);
  cache::FactorView none{};
  read_scales(names.scales, scales, k_cache, -1, none, &factors.written);
  require(!scales || (*scales).size(1) == k_cache.size(1), names.scales,
          " does not have k_cache's page_size");
  return factors;
}

/// The lengths afterwards, at most what the cache can hold, and q turned, or without q nothing.
std::tuple<Tensor, Tensor> append_kv(
    Tensor const& k_cache_tensor, Tensor const& v_cache_tensor, Tensor const& k_tensor,
    Tensor const& v_tensor, Tensor const& cache_seqlens, std::optional<Tensor> cu_seqlens_k_new,
    std::optional<Tensor> page_table, std::optional<Tensor> cache_batch_idx,
    std::optional<Tensor> rotary_cos, std::optional<Tensor> rotary_sin,
    std::optional<Tensor> rotary_seqlens, bool rotary_interleaved, std::optional<Tensor> q_tensor,
    std::optional<Tensor> cu_seqlens_q, bool q_advance, std::optional<Tensor> k_descale,
    std::optional<Tensor> v_descale, std::optional<Tensor> k_scales, std::optional<Tensor> v_scales,
    std::optional<int64_t> rotation_seed) {
  Argument const k_cache("k_cache", k_cache_tensor), v_cache("v_cache", v_cache_tensor),
      k("k", k_tensor), v("v", v_tensor);
  require(k.is_cuda, "k is not on CUDA");
  bool const stored = is_8_bits(k.dtype);
  require(stored || k.dtype == ScalarType::Half || k.dtype == ScalarType::BFloat16,
          "k is not float16 or bfloat16");
  require(!stored || !(rotary_cos || k_scales || v_scales || rotation_seed),
          "rotary_cos, scales or rotation_seed are given with k of 8 bits");
  int64_t const batch = cache_seqlens.numel();
  require(batch < kRowsLimit, "cache_seqlens has 2^31 - 2^10 elements or more");
  cache::Fp8AppendProblem problem{};
  problem.tokens = tokens_of(k, batch, cu_seqlens_k_new);
  tokens_of(v, batch, cu_seqlens_k_new);
  for (size_t dim = 0; dim + 1 < k.sizes.size(); ++dim) {
    require(v.sizes[dim] == k.sizes[dim], "v does not have k's shape");
  }
  bool const eight_bits = is_8_bits(k_cache.dtype);
  problem.k = rows_to_append(k, k_cache, k);
  problem.v = rows_to_append(v, v_cache, k, eight_bits ? kMaxHeadDim : kMaxLatentDim);
  for (int dim = 0; dim < 3; ++dim) {
    require(v_cache.size(dim) == k_cache.size(dim), "v_cache does not have k_cache's shape");
  }
  require(v_cache.dtype == k_cache.dtype, "v_cache does not have k_cache's dtype");
  require(eight_bits || !(k_descale || v_descale || k_scales || v_scales || rotation_seed),
          "descales, scales or rotation_seed are given with a cache of 16 bits");
  problem.is_int8 = k_cache.dtype == ScalarType::Char;
  problem.k_factors = factors_of({"k_descale", "k_scales"}, k_descale, k_scales, k_cache, batch);
  problem.v_factors = factors_of({"v_descale", "v_scales"}, v_descale, v_scales, k_cache, batch);
  problem.rotated = rotation_seed.has_value();
  if (rotation_seed) {
    int const head_dim = problem.k.head_dim;
    require((head_dim & (head_dim - 1)) == 0, "k's head_dim is not a power of 2");
    problem.norm = static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)));
    problem.signs = fp8::random_signs(static_cast<uint64_t>(*rotation_seed));
  }
  problem.lengths = check_int32("cache_seqlens", cache_seqlens, k, 1, batch);
  int const* const positions = check_int32("rotary_seqlens", rotary_seqlens, k, 1, batch);
  problem.positions = positions ? positions : problem.lengths;
  problem.places.page_table = check_int32("page_table", page_table, k, 2, batch);
  problem.places.cache_batch_idx = check_int32("cache_batch_idx", cache_batch_idx, k, 1, batch);
  require(!(page_table && cache_batch_idx), "cache_batch_idx does not go with page_table");
  require(page_table || cache_batch_idx || k_cache.size(0) == batch, "k_cache is not of batch ",
          batch);
  require(!page_table || k_cache.size(1) > 0, "k_cache has pages without rows");
  problem.places.page_table_stride = page_table ? page_table->stride(0) : 0;
  problem.places.pages = static_cast<int>(k_cache.size(0));
  problem.places.page_size = static_cast<int>(k_cache.size(1));
  problem.places.capacity =
      static_cast<int>(std::min(k_cache.size(1) * (page_table ? page_table->size(1) : 1), kMost));
  require(rotary_cos.has_value() == rotary_sin.has_value(),
          "rotary_cos and rotary_sin are not both");
  if (rotary_cos) problem.rotary = rotary_of(*rotary_cos, *rotary_sin, rotary_interleaved, k);
  problem.is_float16 = k.dtype == ScalarType::Half;
  if (q_tensor) {
    Argument const q("q", *q_tensor);
    check_like(q, k);
    problem.queries.tokens = tokens_of(q, batch, cu_seqlens_q);
    problem.queries.advance = q_advance;
    require(rotary_cos.has_value() && 2 * problem.rotary.pairs <= q.sizes.back(),
            "q is given without rotary_cos, or its head_dim is less than rotary_dim");
  }
  attention::Device const& device = hopper(k.device);

  torch::stable::accelerator::DeviceGuard const guard(k.device);
  Tensor lengths_after = empty({batch}, ScalarType::Int, k.device);
  problem.lengths_after = static_cast<int*>(lengths_after.data_ptr());
  Tensor turned = q_tensor ? empty(static_cast<int>(q_tensor->sizes().size()),
                                   q_tensor->sizes().data(), k.dtype, k.device)
                           : empty({0}, k.dtype, k.device);
  if (q_tensor) {
    problem.queries.rows = rows_of(Argument("q", *q_tensor), Argument("out", turned));
    if (turned.numel() == 0) problem.queries.tokens.total = 0;
  }
  if (batch == 0 && problem.queries.tokens.total == 0) return {lengths_after, turned};
  if (!eight_bits || stored) {
    require_success(cache::launch_append(problem, device, current_stream(k.device)), "append_kv");
    return {lengths_after, turned};
  }
#ifdef CUTE_KERNELS_FP8
  require_success(cache::launch_fp8_append(problem, device, current_stream(k.device)), "append_kv");
#else
  fail("this build has no kernels for caches of 8 bits (CUTE_KERNELS_FP8=OFF)");
#endif
  return {lengths_after, turned};
}

}  // namespace
}  // namespace cute_kernels::binding

// Sequence i of a batch has cache_seqlens[i] rows in its cache, and gets k and v behind them: dense
// (batch, seqlen_new, key heads, head_dim), or with cu_seqlens_k_new packed (total, key heads,
// head_dim). Returned are the lengths afterwards, and q turned as k is: by the angles of each
// query's position, counted from the first new key's, or with q_advance = false all by those of the
// latter. Without q that is a tensor of no elements. A cache of 8 bits gets k and v divided by the
// descales, or with the scales, which are written with the rows; with rotation_seed keys are
// rotated. Those of its own dtype it gets as they are.
STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, "
      "Tensor? cu_seqlens_k_new, Tensor? page_table, Tensor? cache_batch_idx, Tensor? rotary_cos, "
      "Tensor? rotary_sin, Tensor? rotary_seqlens, bool rotary_interleaved, Tensor? q=None, "
      "Tensor? cu_seqlens_q=None, bool q_advance=True, Tensor? k_descale=None, "
      "Tensor? v_descale=None, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None, "
      "SymInt? rotation_seed=None) -> (Tensor cache_seqlens_after, Tensor q_rotated)");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("append_kv", TORCH_BOX(&cute_kernels::binding::append_kv));
}
