#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/tma_rows.hpp"

namespace cute_kernels::attention {

/// A tensor in global memory as TMA has it: (rows, columns, heads, batch), columns contiguous.
template <class Element>
auto global_tensor(TensorView const& view, int rows, int columns, int heads, int batch) {
  using namespace cute;
  return make_tensor(make_gmem_ptr(static_cast<Element*>(view.data)),
                     make_shape(rows, columns, heads, batch),
                     make_stride(view.seqlen_stride, _1{}, view.head_stride, view.batch_stride));
}

/// The tensor of any call, for the coordinates of TmaRows: a fifth one is 0 in dense calls. Packed
/// sequences have kManyRows rows to each of two more ways of choosing one, whose sum wraps around.
template <class Element>
auto any_tensor(TensorView const& view, int rows, int columns, int heads, int batch,
                bool is_packed) {
  using namespace cute;
  constexpr int64_t kWrap = (int64_t{1} << 34) / sizeof(Element);
  static_assert(kManyRows == 1 << 30, "as many of kWrap are 2^64 bytes");
  int const entries = is_packed ? rows + 1 : batch;
  int64_t const entry_stride = is_packed ? view.seqlen_stride : view.batch_stride;
  return make_tensor(make_gmem_ptr(static_cast<Element*>(view.data)),
                     make_shape(is_packed ? kManyRows : rows, columns, heads, entries,
                                is_packed ? kManyRows + 1 : 1),
                     make_stride(view.seqlen_stride, _1{}, view.head_stride, entry_stride,
                                 kWrap - view.seqlen_stride));
}

/// The (rows, columns) of a head of a batch entry, from `first_row` on.
template <class Tma, class Shape, class Row>
CUTE_DEVICE auto rows_of_head(Tma const& tma, Shape const& shape, int head, int batch,
                              Row first_row) {
  using namespace cute;
  return domain_offset(make_coord(first_row, _0{}), tma.get_tma_tensor(shape)(_, _, head, batch));
}

/// The same of a sequence, also of any_tensor().
template <class Tma, class Shape>
CUTE_DEVICE auto rows_of_head(Tma const& tma, Shape const& shape, int head, TmaRows const& rows) {
  using namespace cute;
  if constexpr (rank(Shape{}) == 5) {
    return domain_offset(make_coord(rows.first, _0{}),
                         tma.get_tma_tensor(shape)(_, _, head, rows.entry, rows.wrap));
  } else {
    return rows_of_head(tma, shape, head, rows.entry, rows.first);
  }
}

}  // namespace cute_kernels::attention
