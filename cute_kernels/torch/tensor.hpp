#pragma once

#include <cstdint>
#include <initializer_list>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/torch/require.hpp"

namespace cute_kernels::binding {

/// A dense tensor on GPU `device`, not initialised.
inline torch::stable::Tensor empty(std::initializer_list<int64_t> sizes,
                                   torch::headeronly::ScalarType dtype, int device) {
  int64_t strides[4];
  int64_t stride = 1;
  for (int dim = static_cast<int>(sizes.size()) - 1; dim >= 0; --dim) {
    int64_t const size = sizes.begin()[dim];
    strides[dim] = stride;
    stride *= size > 1 ? size : 1;  // as PyTorch's own contiguous strides of empty tensors
  }
  int32_t const type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides, type, aoti_torch_device_type_cuda(), device, &handle));
  return torch::stable::Tensor(handle);
}

/// Whether 16-byte accesses and TMA can read a (batch, seqlen, heads, head_dim) tensor.
inline bool aligned(Argument const& a, int element_bytes) {
  if (reinterpret_cast<uintptr_t>(a.tensor.data_ptr()) % 16 != 0) return false;
  for (int dim = 0; dim < 3; ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) * element_bytes % 16 != 0) return false;
  }
  return true;
}

/// The tensor itself, or a copy where its storage offset or strides are odd.
inline torch::stable::Tensor aligned_tensor(Argument const& a, int element_bytes) {
  return aligned(a, element_bytes) ? a.tensor : torch::stable::clone(a.tensor);
}

inline attention::TensorView view_of(torch::stable::Tensor const& tensor) {
  auto const sizes = tensor.sizes();
  auto const strides = tensor.strides();
  // Nothing reads the stride of a dimension of size 1, but a descriptor wants a valid one.
  auto stride = [&](int dim) { return sizes[dim] > 1 ? strides[dim] : sizes[3]; };
  return {tensor.data_ptr(), stride(0), stride(1), stride(2)};
}

}  // namespace cute_kernels::binding
