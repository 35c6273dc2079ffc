#pragma once

#include <cstdint>

#include "cute_kernels/attention/problem.hpp"

// Plain structs that the framework binding fills and the launch code reads. Nothing here needs a
// CUDA compiler.
namespace cute_kernels::cache {

using attention::TensorView;

inline constexpr int kPairs = 8;  // pairs of channels are a multiple of it

/// What turns pairs of channels: by the angle of position p and of the pair, whose cosine and sine
/// are row p of two tables. Interleaved pairs are channels 2i and 2i + 1, others i and i + pairs;
/// channels from 2 pairs on stay as they are.
struct Rotary {
  void const* cos;
  void const* sin;
  int64_t cos_stride;  // in elements, from a position to the next
  int64_t sin_stride;
  int positions;  // beyond them channels become NaN
  int pairs;      // a multiple of kPairs; 0: nothing is turned
  bool interleaved;
  bool is_float32;  // the tables; else they have the rows' type
  bool aligned;     // addresses and strides of both are multiples of 16 bytes
};

/// The tokens of a batch, dense (batch, seqlen) or packed.
struct Tokens {
  int batch;
  int seqlen;             // of every entry, dense
  int const* cu_seqlens;  // of packed tokens (batch + 1,), else null
  int total;
};

/// Where rows are in a cache: in entries or pages of page_size rows.
struct Places {
  int const* page_table;       // a row of pages for each sequence, or null: entries
  int64_t page_table_stride;   // between sequences
  int const* cache_batch_idx;  // the entry of each sequence, or null: its own number
  int pages;                   // entries, if there is no table
  int page_size;
  int capacity;  // rows that a sequence can have
};

/// Some rows and where they go: tensors (batch, seqlen, heads, head_dim) or packed, and caches
/// (pages, page_size, heads, head_dim).
struct Rows {
  TensorView from;
  TensorView to;
  bool from_aligned;  // address and strides are multiples of 16 bytes
  bool to_aligned;
  int heads;
  int head_dim;  // a multiple of 8
};

/// Queries that are turned like keys: token i of sequence b by the angles of position
/// positions[b] + i, or all of them by those of positions[b]. Rows that no sequence has become 0.
struct Queries {
  Tokens tokens;  // none in all: there are no queries
  bool advance;
  Rows rows;
};

/// Token i of sequence b becomes row lengths[b] + i of the cache. Rows beyond the capacity, and
/// those whose page or entry there is not, are not written.
struct AppendProblem {
  Tokens tokens;
  Places places;
  int const* lengths;    // (batch,)
  int* lengths_after;    // (batch,), from 0 to the capacity
  int const* positions;  // (batch,) of the first tokens, for rotary
  Rotary rotary;         // of K and the queries
  Rows k;
  Rows v;
  Queries queries;
  bool is_float16;  // else bfloat16
};

}  // namespace cute_kernels::cache
