#pragma once

#include <cstdint>

#include <cuda.h>
#include <cute/arch/copy_sm90_desc.hpp>

namespace cute_kernels::sm90 {

/// A tensor of channels and three dimensions more to TMA, in boxes of 64 channels, a row of the
/// 128-byte swizzle. `strides` and `box` are of those three, strides in elements. Nothing reads the
/// stride of a dimension of size 1, but a descriptor wants a valid one.
template <class Element>
cute::TmaDescriptor tma_boxes(void const* data, int64_t const (&sizes)[4],
                              int64_t const (&strides)[3], int const (&box)[3]) {
  cuuint64_t extents[4], bytes[3];
  cuuint32_t box_extents[4] = {64};
  for (int i = 0; i < 4; ++i) extents[i] = static_cast<cuuint64_t>(sizes[i]);
  for (int i = 0; i < 3; ++i) {
    bytes[i] = sizeof(Element) * static_cast<cuuint64_t>(sizes[i + 1] > 1 ? strides[i] : sizes[0]);
    box_extents[i + 1] = static_cast<cuuint32_t>(box[i]);
  }
  cuuint32_t const steps[] = {1, 1, 1, 1};
  cute::TmaDescriptor descriptor;
  cuTensorMapEncodeTiled(&descriptor, cute::TMA::to_CUtensorMapDataType<Element>(), 4,
                         const_cast<void*>(data), extents, bytes, box_extents, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return descriptor;
}

}  // namespace cute_kernels::sm90
