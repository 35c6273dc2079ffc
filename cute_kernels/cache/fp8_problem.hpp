#pragma once

#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/cache/problem.hpp"

// Plain structs that the framework binding fills and the launch code reads. Nothing here needs a
// CUDA compiler.
namespace cute_kernels::cache {

using attention::FactorView;

/// What numbers of K or of V are multiples of: given, of sequences or of rows, or written with each
/// row. Null data: not this one; if none is there 1.
struct Factors {
  FactorView of_sequence;
  FactorView of_row;
  FactorView written;  // to be written
};

/// Rows to caches of 8 bits, whose elements `to` of k and v count.
struct Fp8AppendProblem : AppendProblem {
  bool is_int8;  // or e4m3
  Factors k_factors;
  Factors v_factors;
  bool rotated;  // K's rows are; its head_dim is a power of 2 then
  float norm;    // that makes the rotation orthogonal
  fp8::Signs signs;
};

}  // namespace cute_kernels::cache
