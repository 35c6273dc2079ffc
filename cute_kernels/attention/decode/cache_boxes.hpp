#pragma once

#include "cute_kernels/attention/decode/problem.hpp"
#include "cute_kernels/sm90/tma_boxes.hpp"

namespace cute_kernels::attention {

/// A cache to TMA: (columns, slots, heads, pages).
template <class Element>
cute::TmaDescriptor boxes_of(CacheView const& view, int columns, int heads, CachePages const& pages,
                             int box_rows) {
  return sm90::tma_boxes<Element>(view.data, {columns, pages.page_size, heads, pages.pages},
                                  {view.slot_stride, view.head_stride, view.page_stride},
                                  {box_rows, 1, 1});
}

}  // namespace cute_kernels::attention
