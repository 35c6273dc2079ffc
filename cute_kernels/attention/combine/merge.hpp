#pragma once

#include <cuda_runtime_api.h>

#include "cute_kernels/attention/combine/problem.hpp"
#include "cute_kernels/attention/problem.hpp"

// Attention to two parts of the keys, made one, and sums of gradients: what context parallelism
// does between its steps. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// Results of a part of the keys.
struct PartialResult {
  TensorView out;  // (batch, seqlen, heads, head_dim)
  CombinedType type;
  TensorView lse;  // (batch, seqlen, heads) of float, in whatever order: natural logarithm
};

/// Requires fewer than 2^31 rows. `merged` may be `first`; then rows in which `second` has an LSE
/// of -inf are left alone. A row's output is not looked at where its LSE is -inf.
struct MergeProblem {
  PartialResult first;
  PartialResult second;
  PartialResult merged;
  bool in_place;
  int batch;
  int seqlen;
  int heads;
  int head_dim;  // a multiple of 8
};

/// Asynchronous.
cudaError_t launch_merge(MergeProblem const& problem, cudaStream_t stream, int device);

/// Of float, (batch, seqlen, heads, head_dim); every address and stride a multiple of 16 bytes.
struct AddProblem {
  TensorView sum;
  TensorView term;
  int batch;
  int seqlen;
  int heads;
  int head_dim;
};

/// sum += term. Asynchronous.
cudaError_t launch_add(AddProblem const& problem, cudaStream_t stream, int device);

}  // namespace cute_kernels::attention
