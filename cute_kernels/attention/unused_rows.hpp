#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

namespace cute_kernels::attention {

/// Rows of packed results that no sequence uses hold 0, and as their LSE -inf.
struct UnusedRows {
  void* out;
  int64_t row_bytes;  // of `out`; a multiple of 16, as its address is
  float* lse;         // (heads, total)
  int heads;
  int total;

  /// The work of some threads, of which the calling one is number `thread`.
  CUTLASS_DEVICE void clear(int64_t row, int thread, int threads) const {
    auto* const vectors = reinterpret_cast<uint4*>(static_cast<char*>(out) + row * row_bytes);
    int const count = static_cast<int>(row_bytes / int64_t{sizeof(uint4)});
    for (int i = thread; i < count; i += threads) vectors[i] = uint4{};
    for (int head = thread; head < heads; head += threads) {
      lse[int64_t{head} * total + row] = -INFINITY;
    }
  }
};

}  // namespace cute_kernels::attention
