#pragma once

#include "cute_kernels/attention/decode/cache_rows.hpp"

namespace cute_kernels::attention {

/// Where queries and keys are.
struct LatentSource {
  CacheSource cache;
  TensorView qv;
  int heads_of_key;  // see LatentProblem
};

}  // namespace cute_kernels::attention
