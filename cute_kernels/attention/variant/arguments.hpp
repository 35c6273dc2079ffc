#pragma once

#include <cstdint>

// What a call hands to the hooks of a user's variant. Plain structs: nothing here needs a CUDA
// compiler.
namespace cute_kernels::attention {

inline constexpr int kMostCaptured = 8;
inline constexpr int kMostAxes = 4;

/// What backward computes of a captured tensor's gradient, in fp32: the sum over queries and keys
/// of each head of each block of keys, or what each score adds.
enum class Gradient { kNone, kOfHeads, kOfScores };

/// A tensor that hooks read, in device memory. Every size is at least 1; strides count elements.
struct CapturedTensor {
  void const* data;
  int strides[kMostAxes];
  int sizes[kMostAxes];
};

/// A number, in both of the types that a hook may have it in.
struct CapturedNumber {
  float as_float;
  int as_int;
};

/// Queries and keys of a unit of block masks. Tiles of kernels that take one are parts of a unit.
inline constexpr int kMaskUnit = 128;

/// A block mask (python/cute_kernels/variants/block_mask.py), in device memory: which units of keys
/// are not hidden from each unit of queries, or backward, the other way round. There are fewer than
/// 2^31 entries.
struct BlockLists {
  int const* counts;   // (batch, heads, units)
  int const* entries;  // (batch, heads, units, capacity): ascending numbers times 2, + 1 if full
  int const* turns;    // backward: of an entry, how many smaller units of keys its queries see
  int rows_of_batch;   // rows of a batch entry; 0: all have the same
  int rows_of_head;
  int capacity;
};

struct VariantArguments {
  CapturedTensor tensors[kMostCaptured];
  CapturedNumber numbers[kMostCaptured];
  // Backward: where the kernel writes what its row has gradients of, in the order of the tensors
  // (backward/captured_gradients.hpp).
  float* gradients[kMostCaptured];
  float scale;  // of the products
  // Captured tensors have no fewer along query and key, at least 1, whatever cu_seqlens holds.
  int most_queries;
  int most_keys;
  // Packed sequences, for their numbers: (batch + 1); null: the call is dense.
  int const* cu_seqlens_q;
  int const* cu_seqlens_k;
  int sequences;
  BlockLists blocks;  // of kernels with a block mask
  // What a mask hook shows all heads (variant/shared_mask.hpp), or null. The launch says where.
  uint32_t const* shared_mask;
};

}  // namespace cute_kernels::attention
