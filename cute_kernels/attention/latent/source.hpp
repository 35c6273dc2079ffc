#pragma once

#include <cute/arch/copy_sm90_desc.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"

namespace cute_kernels::attention {

/// Where queries and keys are.
struct LatentSource {
  cute::TmaDescriptor boxes_k;  // as TMA sees the cache, in boxes of box_rows rows
  cute::TmaDescriptor boxes_v;
  int box_rows;  // 0: rows are gathered
  bool pairs;  // CTAs (x, 2 y) and (x, 2 y + 1) are a cluster, and load half of each block for both
  CacheSource cache;
  TensorView qv;
};

}  // namespace cute_kernels::attention
