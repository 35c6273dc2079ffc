#pragma once

#include <cstdint>
#include <initializer_list>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/torch/require.hpp"

namespace cute_kernels::binding {

constexpr int kTmaBytes = 16;  // a TMA descriptor's address and strides are multiples of it

/// Of a (batch, seqlen, heads, head_dim) tensor, or of a packed (total, heads, head_dim) one.
inline attention::TensorView view(torch::stable::Tensor const& tensor) {
  auto const sizes = tensor.sizes();
  auto const strides = tensor.strides();
  size_t const last = sizes.size() - 1;
  // Nothing reads the stride of a dimension of size 1, but a descriptor wants a valid one.
  auto stride = [&](size_t dim) { return sizes[dim] > 1 ? strides[dim] : sizes[last]; };
  return {tensor.data_ptr(), last == 3 ? stride(0) : sizes[last], stride(last - 2),
          stride(last - 1)};
}

/// A dense tensor on GPU `device`, not initialised.
inline torch::stable::Tensor empty(int rank, int64_t const* sizes,
                                   torch::headeronly::ScalarType dtype, int device) {
  int64_t strides[4];
  int64_t stride = 1;
  for (int dim = rank - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *=
        sizes[dim] > 1 ? sizes[dim] : 1;  // as PyTorch's own contiguous strides of empty tensors
  }
  int32_t const type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  auto const status = aoti_torch_empty_strided(rank, sizes, strides, type,
                                               aoti_torch_device_type_cuda(), device, &handle);
  require_torch(status, "allocate a tensor of shape ", Shape{{sizes, static_cast<size_t>(rank)}},
                " and dtype ", DtypeOf{dtype}, " on cuda:", device, " (out of memory?)");
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor empty(std::initializer_list<int64_t> sizes,
                                   torch::headeronly::ScalarType dtype, int device) {
  return empty(static_cast<int>(sizes.size()), sizes.begin(), dtype, device);
}

/// Whether TMA and 16-byte accesses can read a tensor whose last dimension is head_dim.
inline bool suits_tma(Argument const& a, int element_bytes) {
  if (reinterpret_cast<uintptr_t>(a.tensor.data_ptr()) % kTmaBytes != 0) return false;
  int const last = static_cast<int>(a.sizes.size()) - 1;
  if (a.stride(last) != 1 && a.size(last) > 1) return false;
  for (int dim = 0; dim < last; ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) * element_bytes % kTmaBytes != 0) return false;
  }
  return true;
}

/// Says once in a process, as Python's UserWarning, that `a` is copied since TMA cannot read it.
void warn_of_copy(Argument const& a, int element_bytes);

/// The tensor itself, or a dense copy where TMA cannot read it (an odd storage offset or stride).
/// A gradient that is the same in all of head_dim is copied without a word: it comes from a sum,
/// and nobody could lay it out in another way.
inline torch::stable::Tensor tma_readable(Argument const& a, int element_bytes) {
  if (suits_tma(a, element_bytes)) return a.tensor;
  if (a.strides.back() != 0) warn_of_copy(a, element_bytes);
  torch::stable::Tensor copy =
      empty(static_cast<int>(a.sizes.size()), a.sizes.data(), a.dtype, a.device);
  return torch::stable::copy_(copy, a.tensor);
}

}  // namespace cute_kernels::binding
