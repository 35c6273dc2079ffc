#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/combine/merge.hpp"
#include "cute_kernels/attention/combine/problem.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/device.hpp"
#include "cute_kernels/torch/require.hpp"
#include "cute_kernels/torch/tensor.hpp"

// Results of parts of the keys, made one.
namespace cute_kernels::binding {
namespace {

using attention::CombinedType;
using attention::CombineProblem;
using attention::MergeProblem;
using attention::PartialResult;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What is refused here is refused in few words: the checks in Python then say what is wrong.
void check_sizes(Argument const& a, size_t rank) {
  require(a.sizes.size() == rank, a.name, " does not have ", rank, " dimensions");
  for (int64_t size : a.sizes) {
    require(size <= std::numeric_limits<int>::max(), a.name, " has a size of 2^31 or more");
  }
}

CombinedType combined_type(char const* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return CombinedType::kFloat32;
    case ScalarType::Half:
      return CombinedType::kFloat16;
    case ScalarType::BFloat16:
      return CombinedType::kBFloat16;
    default:
      fail(name, " is ", DtypeOf{dtype}, ", must be float32, float16 or bfloat16");
  }
}

CombineProblem::Strides strides_of(Argument const& a) {
  return {a.stride(0), a.stride(1), a.stride(2), a.stride(3)};
}

std::tuple<Tensor, Tensor> flash_attn_combine(Tensor const& out_partial, Tensor const& lse_partial,
                                              std::optional<ScalarType> out_dtype) {
  Argument const partial("out_partial", out_partial), partial_lse("lse_partial", lse_partial);
  require(partial.is_cuda, "out_partial is not on CUDA");
  check_like(partial_lse, partial);
  require(partial.dtype == ScalarType::Float, "out_partial is not float32");
  check_sizes(partial, 5);
  check_sizes(partial_lse, 4);
  for (int dim = 0; dim < 4; ++dim) {
    require(partial_lse.size(dim) == partial.size(dim),
            "lse_partial does not have out_partial's sizes before head_dim");
  }
  require(partial.stride(4) == 1 || partial.size(4) <= 1,
          "out_partial's head_dim is not contiguous");
  ScalarType const dtype = out_dtype.value_or(ScalarType::Float);
  CombineProblem problem{};
  problem.out_partial = static_cast<float const*>(out_partial.data_ptr());
  problem.out_strides = strides_of(partial);
  problem.lse_partial = static_cast<float const*>(lse_partial.data_ptr());
  problem.lse_strides = strides_of(partial_lse);
  problem.type = combined_type("out_dtype", dtype);
  problem.splits = static_cast<int>(partial.size(0));
  problem.batch = static_cast<int>(partial.size(1));
  problem.seqlen = static_cast<int>(partial.size(2));
  problem.heads = static_cast<int>(partial.size(3));
  problem.head_dim = static_cast<int>(partial.size(4));
  hopper(partial.device);

  torch::stable::accelerator::DeviceGuard const guard(partial.device);
  Tensor out = empty({partial.size(1), partial.size(2), partial.size(3), partial.size(4)}, dtype,
                     partial.device);
  Tensor lse =
      empty({partial.size(1), partial.size(3), partial.size(2)}, ScalarType::Float, partial.device);
  problem.out = out.data_ptr();
  problem.lse = static_cast<float*>(lse.data_ptr());
  if (lse.numel() > 0) {
    require_success(
        attention::launch_combine(problem, current_stream(partial.device), partial.device),
        "flash_attn_combine");
  }
  return {out, torch::stable::transpose(lse, 1, 2)};
}

/// What two parts and their merged result have in common: dense (batch, seqlen, heads, head_dim)
/// and (batch, heads, seqlen), or packed (total, heads, head_dim) and (heads, total).
struct Sizes {
  int64_t batch;
  int64_t seqlen;
  int64_t heads;
  int64_t head_dim;

  explicit Sizes(Argument const& out)
      : batch(out.sizes.size() == 4 ? out.size(0) : 1),
        seqlen(out.sizes[out.sizes.size() - 3]),
        heads(out.sizes[out.sizes.size() - 2]),
        head_dim(out.sizes.back()) {}
};

PartialResult part_of(Argument const& out, Argument const& lse, Argument const& first) {
  size_t const rank = first.sizes.size();
  Sizes const sizes(first);
  check_device(out, first);
  check_device(lse, first);
  require(out.sizes.equals(first.sizes), out.name, " does not have the sizes of ", first.name);
  require(out.strides.back() == 1 || sizes.head_dim <= 1, out.name,
          "'s head_dim is not contiguous");
  require(lse.dtype == ScalarType::Float, lse.name, " is not float32");
  std::array<int64_t, 3> const of_lse{sizes.batch, sizes.heads, sizes.seqlen};
  require(lse.sizes.equals({of_lse.data() + (4 - rank), rank - 1}), lse.name,
          " does not have a value for each query of each head");
  auto const strides = lse.strides;
  return {
      view(out.tensor),
      combined_type(out.name, out.dtype),
      {lse.tensor.data_ptr(), rank == 4 ? strides[0] : 0, strides[rank - 2], strides[rank - 3]}};
}

/// `merged` is `first`, or as large.
void merge(PartialResult const& first, PartialResult const& second, PartialResult const& merged,
           bool in_place, Argument const& out) {
  Sizes const sizes(out);
  require(sizes.head_dim % 8 == 0, out.name, "'s head_dim is not a multiple of 8");
  double const rows = static_cast<double>(sizes.batch) * sizes.seqlen * sizes.heads;
  require(rows < 2147483648., out.name, " has 2^31 rows or more");
  if (rows == 0 || sizes.head_dim == 0) return;
  MergeProblem const problem{first,
                             second,
                             merged,
                             in_place,
                             static_cast<int>(sizes.batch),
                             static_cast<int>(sizes.seqlen),
                             static_cast<int>(sizes.heads),
                             static_cast<int>(sizes.head_dim)};
  require_success(attention::launch_merge(problem, current_stream(out.device), out.device),
                  "flash_attn_merge");
}

void flash_attn_merge_(Tensor const& out_tensor, Tensor const& lse_tensor,
                       Tensor const& part_out_tensor, Tensor const& part_lse_tensor) {
  Argument const out("out", out_tensor), lse("lse", lse_tensor);
  Argument const part_out("part_out", part_out_tensor), part_lse("part_lse", part_lse_tensor);
  require(out.is_cuda, "out is not on CUDA");
  require(out.sizes.size() == 3 || out.sizes.size() == 4, "out does not have 3 or 4 dimensions");
  PartialResult const own = part_of(out, lse, out), part = part_of(part_out, part_lse, out);
  hopper(out.device);
  torch::stable::accelerator::DeviceGuard const guard(out.device);
  merge(own, part, own, true, out);
}

std::tuple<Tensor, Tensor> flash_attn_merge(Tensor const& out_tensor, Tensor const& lse_tensor,
                                            Tensor const& part_out_tensor,
                                            Tensor const& part_lse_tensor,
                                            std::optional<ScalarType> out_dtype) {
  Argument const out("out", out_tensor), lse("lse", lse_tensor);
  Argument const part_out("part_out", part_out_tensor), part_lse("part_lse", part_lse_tensor);
  require(out.is_cuda, "out is not on CUDA");
  require(out.sizes.size() == 3 || out.sizes.size() == 4, "out does not have 3 or 4 dimensions");
  PartialResult const first = part_of(out, lse, out), second = part_of(part_out, part_lse, out);
  combined_type("out_dtype", out_dtype.value_or(out.dtype));
  hopper(out.device);
  torch::stable::accelerator::DeviceGuard const guard(out.device);
  auto like = [&](Argument const& a, ScalarType dtype) {
    return empty(static_cast<int>(a.sizes.size()), a.sizes.data(), dtype, a.device);
  };
  Tensor merged = like(out, out_dtype.value_or(out.dtype)), merged_lse = like(lse, lse.dtype);
  Argument const merged_out("merged", merged), of_merged("merged_lse", merged_lse);
  merge(first, second, part_of(merged_out, of_merged, out), false, out);
  return {merged, merged_lse};
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  // Of (splits, batch, seqlen, heads, head_dim) and (splits, batch, seqlen, heads). The LSE
  // returned is (batch, seqlen, heads), a view of a dense (batch, heads, seqlen).
  library.def(
      "flash_attn_combine(Tensor out_partial, Tensor lse_partial, *, ScalarType? out_dtype=None) "
      "-> (Tensor out, Tensor lse)");
  // Of two parts as the forward operators, dense and varlen, give them.
  library.def(
      "flash_attn_merge(Tensor out, Tensor lse, Tensor part_out, Tensor part_lse, *, "
      "ScalarType? out_dtype=None) -> (Tensor out, Tensor lse)");
  // The same in `out` and `lse`. Rows in which the part has an LSE of -inf are left alone.
  library.def(
      "flash_attn_merge_(Tensor(a!) out, Tensor(b!) lse, Tensor part_out, Tensor part_lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CUDA, library) {
  library.impl("flash_attn_combine", TORCH_BOX(&cute_kernels::binding::flash_attn_combine));
  library.impl("flash_attn_merge", TORCH_BOX(&cute_kernels::binding::flash_attn_merge));
  library.impl("flash_attn_merge_", TORCH_BOX(&cute_kernels::binding::flash_attn_merge_));
}
