#pragma once

#include <cstdint>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/ranges.hpp"

// How a kernel finds a sequence: one entry of a dense call's batch, or one of the packed ones. Only
// the device can read the latter. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// The rows of one sequence. Of Q, O and their gradients they are those from row_q up to before
/// row_q + seqlen_q of the tensors' entry `batch`, of K and V those from row_k on. All lie in the
/// tensors, whatever cu_seqlens and seqused hold.
struct Sequence {
  int batch;
  int row_q;
  int row_k;
  int seqlen_q;
  int seqlen_k;
};

/// Some rows of a tensor.
struct RowSpan {
  int first;
  int count;
};

/// The rows that sequence `entry` uses of a tensor with `total` rows.
constexpr RowSpan packed_rows(int const* cu_seqlens, int const* seqused, int total, int entry) {
  int const first = lesser(greater(0, cu_seqlens[entry]), total);
  int const slot = lesser(greater(first, cu_seqlens[entry + 1]), total) - first;
  int const used = seqused == nullptr ? slot : lesser(greater(0, seqused[entry]), slot);
  return {first, used};
}

constexpr Sequence sequence_of(AttentionCall const& call, int entry) {
  if (!call.is_packed()) return {entry, 0, 0, call.sizes.seqlen_q, call.sizes.seqlen_k};
  PackedLengths const& packed = call.packed;
  RowSpan const q = packed_rows(packed.cu_seqlens_q, packed.seqused_q, packed.total_q, entry);
  RowSpan const k = packed_rows(packed.cu_seqlens_k, packed.seqused_k, packed.total_k, entry);
  return {0, q.first, k.first, q.count, k.count};
}

constexpr int sequences(AttentionCall const& call) { return call.sizes.batch; }

/// What a call is, for those who are told of it in other units.
constexpr AttentionCall const& attention_call(AttentionCall const& call) { return call; }

/// What the sequence's queries see of its keys.
constexpr WindowRanges ranges_of(AttentionCall const& call, Sequence const& sequence, int entry) {
  int const bottom_right = sequence.seqlen_k - sequence.seqlen_q;
  int const diagonal = call.packed.diagonal != nullptr ? call.packed.diagonal[entry]
                                                       : call.mask.diagonal.value_or(bottom_right);
  return WindowRanges(call.mask, diagonal, sequence.seqlen_q, sequence.seqlen_k);
}

/// The first block of sequence `entry`, whose slot begins at row `first`, where each sequence has
/// whole blocks of `block` rows to itself, one behind the other: no two meet, whatever their
/// lengths are, and blocks_of_all() is enough, without a sum over the sequences before.
constexpr int first_block(int first, int entry, int block) { return first / block + entry; }

/// How many blocks `batch` sequences with `total` rows have then, at most.
constexpr int64_t blocks_of_all(int64_t total, int64_t batch, int64_t block) {
  return total / block + batch;
}

/// The last sequence whose slot begins at or before `row`; 0 where there is none. starts[i] does
/// not decrease.
constexpr int entry_at(int const* starts, int entries, int row) {
  int low = 0, high = entries;
  while (high - low > 1) {
    int const middle = low + (high - low) / 2;
    (starts[middle] <= row ? low : high) = middle;
  }
  return low;
}

/// Whether some sequence uses a row of a tensor with `total` rows.
constexpr bool is_used(int const* cu_seqlens, int const* seqused, int total, int entries, int row) {
  if (entries == 0) return false;
  RowSpan const rows = packed_rows(cu_seqlens, seqused, total, entry_at(cu_seqlens, entries, row));
  return row >= rows.first && row < rows.first + rows.count;
}

/// Rows and batch entries of Q, O and dQ as TMA has them, and of K, V and their gradients.
constexpr int tensor_rows_q(AttentionCall const& call) {
  return call.is_packed() ? call.packed.total_q : call.sizes.seqlen_q;
}
constexpr int tensor_rows_k(AttentionCall const& call) {
  return call.is_packed() ? call.packed.total_k : call.sizes.seqlen_k;
}
constexpr int tensor_batch(AttentionCall const& call) {
  return call.is_packed() ? 1 : call.sizes.batch;
}

}  // namespace cute_kernels::attention
