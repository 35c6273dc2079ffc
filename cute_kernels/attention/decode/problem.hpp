#pragma once

#include <cstdint>
#include <limits>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/problem.hpp"

// One call of attention to a cache of keys and values. Plain structs: nothing here needs a CUDA
// compiler.
namespace cute_kernels::attention {

/// What the device alone knows of a call's sequences, and may change from run to run of a CUDA
/// graph: where the queries of each lie, and which rows of its cache are keys. Sequence i has the
/// queries from cu_seqlens_q[i] up to before cu_seqlens_q[i + 1], and the keys from leftpad[i] up
/// to before used[i].
struct CacheLengths {
  int const* cu_seqlens_q;  // (batch + 1)
  int const* used;          // (batch)
  int const* leftpad;       // (batch), or null: 0
};

/// Keys or values: row `slot` of a page's head is at data + page * page_stride + slot * slot_stride
/// + head * head_stride. Strides count elements; rows are contiguous.
struct CacheView {
  void const* data;
  int64_t page_stride;
  int64_t slot_stride;
  int64_t head_stride;
};

/// Where a sequence's keys lie. With a table key j is in slot j % page_size of the page
/// table[sequence * table_stride + j / page_size]; without one a page is a whole sequence's, and
/// sequence i has page entries[i].
struct CachePages {
  int const* table;  // or null; entries beyond the used keys may be anything
  int64_t table_stride;
  int const* entries;  // (batch), or null: i
  int pages;           // others than 0 to pages - 1 are not there: their keys and values are 0
  int page_size;
  int pages_of_sequence;  // there is room for page_size times as many keys
};

struct CachedCall {
  int batch;
  int total_q;  // rows of Q
  int heads_q;
  int heads_kv;
  int group;  // query heads of a key head
  int head_dim;
  int head_dim_v;
  int most_keys;  // that the cache of a sequence has room for
  MaskSpec mask;  // without a diagonal of its own: bottom-right aligned by the used lengths
  float scale;
  float softcap;  // of the scaled scores; 0: none
  CacheLengths lengths;
  int chunk = 0;  // keys of a chunk, counted from a sequence's first one, or 0: see CachedSequence
  // (total_q), or null: bit j of a query: whether it sees new key j, of the last keys of its
  // sequence, as many as it has queries. It sees no new key from number 64 on.
  int64_t const* tree_mask = nullptr;
  // A launch answers the sequences that have so many rows (queries * group); of others it writes
  // nothing.
  int least_rows = 0;
  int most_rows = std::numeric_limits<int>::max();
  // What each part of an item adds to the time that the last one takes to combine them, in 1/64 of
  // a block's; 0: nothing to speak of.
  int part_cost = 0;
};

/// All parts of a call's work are numbered by an int, with 1/16 to spare.
inline constexpr int64_t kMostBlocks = 2000000000;

/// How many blocks of tile_n keys a call may have, for tiles of tile_m rows.
constexpr int64_t most_blocks(CachedCall const& call, int tile_m, int tile_n) {
  int64_t const tiles = int64_t{call.total_q} * call.group / tile_m + call.batch;
  return call.heads_kv * tiles * (call.most_keys / tile_n + 1);
}

/// One call. Requires heads_q % heads_kv == 0, every pointer and byte stride a multiple of 16,
/// heads and total_q at least 1, total_q * heads_q below 2^31, most_keys at most 2^30, most_blocks
/// of the kernel's tile at most kMostBlocks.
struct DecodeProblem {
  CachedCall call;
  CachePages pages;
  int num_splits;  // at most so many parts of the keys; 1: none is split, 0: as fits the GPU
  TensorView q;    // (total_q, heads_q, head_dim)
  CacheView k;
  CacheView v;
  float const* sinks;  // (heads_q), or null
  void* out;           // (total_q, heads_q, head_dim_v), dense
  float* lse;          // (heads_q, total_q), natural logarithm
  void* workspace;     // 256-byte aligned, contents undefined on entry
  uint64_t ticket;     // no other launch with the same workspace has it, but a graph's replays do
  Device device;
};

}  // namespace cute_kernels::attention
