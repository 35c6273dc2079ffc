#pragma once

#include <cutlass/fast_math.h>

#include "cute_kernels/attention/decode/work.hpp"

namespace cute_kernels::attention {

/// What the producer is told at run time.
struct CacheSource {
  CachePages pages;
  cutlass::FastDivmod page_size;
  cutlass::FastDivmod group;  // query heads of a key head
  TensorView q;
  CacheView k;
  CacheView v;
};

/// A row that a lane has found for its warp: major and minor are multiples of strides.
struct FoundRow {
  int major;  // -1: it is not there
  int minor;
};

/// Where key `key` of a sequence is in the cache.
CUTLASS_DEVICE FoundRow row_of_key(CacheSource const& source, int entry, int key) {
  CachePages const& pages = source.pages;
  FoundRow row{-1, key};
  if (pages.table != nullptr) {
    int page;
    source.page_size(page, row.minor, key);
    row.major = __ldg(pages.table + entry * pages.table_stride + page);
  } else {
    row.major = pages.entries == nullptr ? entry : __ldg(pages.entries + entry);
  }
  if (row.major >= pages.pages) row.major = -1;
  return row;
}

}  // namespace cute_kernels::attention
