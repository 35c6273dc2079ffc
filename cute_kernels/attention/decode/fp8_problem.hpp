#pragma once

#include <cstdint>

#include "cute_kernels/attention/decode/problem.hpp"
#include "cute_kernels/fp8/problem.hpp"

// One call of attention to a cache of 8 bits. Plain structs: nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// Factors of heads of K and V: of a sequence, or of a row in a slot of a page. Null data: 1.
struct FactorView {
  float const* data;
  int64_t page_stride;  // or from a sequence to the next
  int64_t slot_stride;
  int64_t head_stride;
};

enum class QueryType { kFloat16, kBFloat16, kE4m3 };

/// What a cache of 8 bits holds, and how numbers become keys, values and queries: times the factors
/// of their sequence, keys and values also times those of their row. Requires rows of 16 bytes.
struct EightBits {
  bool is_int8;  // or e4m3
  QueryType q_type;
  bool out_is_bfloat16;  // or float16
  FactorView q_of_sequence;
  FactorView k_of_sequence;
  FactorView v_of_sequence;
  FactorView k_of_row;
  FactorView v_of_row;
  bool rotated;  // keys are; head_dim is a power of two then
  fp8::Signs signs;
};

struct Fp8DecodeProblem : DecodeProblem {
  EightBits format;
};

}  // namespace cute_kernels::attention
