#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/problem.hpp"

namespace cute_kernels::attention {

/// A tensor in global memory as TMA has it: (rows, columns, heads, batch), columns contiguous.
template <class Element>
auto global_tensor(TensorView const& view, int rows, int columns, int heads, int batch) {
  using namespace cute;
  return make_tensor(make_gmem_ptr(static_cast<Element*>(view.data)),
                     make_shape(rows, columns, heads, batch),
                     make_stride(view.seqlen_stride, _1{}, view.head_stride, view.batch_stride));
}

/// A (total, heads, head_dim) tensor of packed sequences, for the coordinates of TmaRows.
template <class Element>
auto packed_tensor(TensorView const& view, int total, int columns, int heads) {
  TensorView shifted = view;
  shifted.data = static_cast<Element*>(view.data) - total * view.seqlen_stride;
  shifted.batch_stride = view.seqlen_stride;
  return global_tensor<Element>(shifted, total, columns, heads, total + 1);
}

}  // namespace cute_kernels::attention
