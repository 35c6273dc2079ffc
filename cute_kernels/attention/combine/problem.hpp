#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

// Attention to parts of the keys, made one. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

enum class CombinedType { kFloat32, kFloat16, kBFloat16 };

/// Results of `splits` parts of the keys. Strides count elements, head_dim is contiguous.
struct CombineProblem {
  struct Strides {
    int64_t split;
    int64_t batch;
    int64_t seqlen;
    int64_t head;
  };

  float const* out_partial;  // (splits, batch, seqlen, heads, head_dim)
  Strides out_strides;
  float const* lse_partial;  // (splits, batch, seqlen, heads), natural logarithm
  Strides lse_strides;
  CombinedType type;
  void* out;   // (batch, seqlen, heads, head_dim), dense
  float* lse;  // (batch, heads, seqlen), dense
  int splits;
  int batch;
  int seqlen;
  int heads;
  int head_dim;
};

/// Rows that saw no key in any part become 0, and their LSE -inf. Asynchronous.
cudaError_t launch_combine(CombineProblem const& problem, cudaStream_t stream, int device);

}  // namespace cute_kernels::attention
