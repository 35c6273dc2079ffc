#pragma once

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/tma_rows.hpp"

// How backward counts blocks of packed rows, also of rows that no sequence uses, whose gradients
// are 0, and in what order key blocks add to dQ. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// Rows that belong to a sequence, of which it uses the first `used`.
struct Slot {
  int first;
  int rows;
  int used;
};

/// The slots of Q, or of K and V. Behind the last sequence's the rows that are left are one more,
/// of which nothing is used. Whatever the lengths' contents, a slot lies inside the tensor.
///
/// Blocks are counted over all slots though each begins with its slot: a slot's first block has the
/// number first / block + slot, for which nobody adds up lengths. So there are numbers without
/// rows.
struct PackedSlots {
  int const* cu_seqlens;
  int const* seqused;
  int sequences;
  int total;

  constexpr Slot slot(int number) const {
    int const first = first_row(number);
    if (number == sequences) return {first, total - first, 0};
    int const rows = inside(cu_seqlens[number + 1], first) - first;
    return {first, rows, seqused == nullptr ? rows : lesser(greater(0, seqused[number]), rows)};
  }

  /// How many numbers of blocks there are.
  constexpr int blocks(int block) const { return total / block + sequences + 1; }

  constexpr int first_block(int slot, int block) const { return first_row(slot) / block + slot; }

  /// The slot with the block of this number, if that has rows.
  constexpr int slot_of(int number, int block) const {
    int low = 0, high = sequences;
    while (low < high) {
      int const middle = high - (high - low) / 2;
      if (first_block(middle, block) <= number) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

 private:
  constexpr int inside(int row, int least) const { return lesser(greater(row, least), total); }
  constexpr int first_row(int slot) const { return slot == 0 ? 0 : inside(cu_seqlens[slot], 0); }
};

constexpr PackedSlots slots_of_q(AttentionCall const& call) {
  PackedLengths const& packed = call.packed;
  return {packed.cu_seqlens_q, packed.seqused_q, call.sizes.batch, packed.total_q};
}
constexpr PackedSlots slots_of_k(AttentionCall const& call) {
  PackedLengths const& packed = call.packed;
  return {packed.cu_seqlens_k, packed.seqused_k, call.sizes.batch, packed.total_k};
}

/// Whether a sequence ends before it begins. Then slots overlap, and key blocks could wait for one
/// that no number leads to.
constexpr bool is_reversed(PackedLengths const& packed, int sequence) {
  return packed.cu_seqlens_q[sequence + 1] < packed.cu_seqlens_q[sequence] ||
         packed.cu_seqlens_k[sequence + 1] < packed.cu_seqlens_k[sequence];
}

/// A call's blocks, numbered for each of its heads, or heads and batch entries.
constexpr int query_block_numbers(AttentionCall const& call, int tile_m) {
  if (call.is_packed()) return slots_of_q(call).blocks(tile_m);
  return (call.sizes.seqlen_q + tile_m - 1) / tile_m;
}
constexpr int key_block_numbers(AttentionCall const& call, int keys) {
  if (call.is_packed()) return slots_of_k(call).blocks(keys);
  return (call.sizes.seqlen_k + keys - 1) / keys;
}

/// Of a batch entry of a dense call, or of one of the slots of a packed one.
struct BackwardSequence {
  int batch;  // of a dense call; 0 of a packed one
  Slot q;
  Slot k;
  WindowRanges ranges;
  int first_query_block;  // its number, of the first head
  TmaRows tma_q;          // what is used of Q and dO
  TmaRows tma_k;          // of K and V
  TmaRows tma_grad_k;     // all of the slot, of dK and dV

  /// Where the first query stands in a tensor like Q, of head 0.
  constexpr int64_t offset_of_q(int64_t batch_stride, int64_t seqlen_stride) const {
    return batch * batch_stride + q.first * seqlen_stride;
  }

  /// Whether some query does not see some key.
  constexpr bool hides_values() const {
    return ranges.first_key(ranges.seqlen_q - 1) > 0 || ranges.end_key(0) < ranges.seqlen_k;
  }
};

constexpr BackwardSequence backward_sequence(AttentionCall const& call, int entry, int tile_m) {
  if (!call.is_packed()) {
    int const seqlen_q = call.sizes.seqlen_q, seqlen_k = call.sizes.seqlen_k;
    TmaRows const rows = dense_tma_rows(entry);
    int const blocks = entry * call.sizes.heads_q * query_block_numbers(call, tile_m);
    return {entry,
            {0, seqlen_q, seqlen_q},
            {0, seqlen_k, seqlen_k},
            WindowRanges(call),
            blocks,
            rows,
            rows,
            rows};
  }
  PackedSlots const slots_q = slots_of_q(call), slots_k = slots_of_k(call);
  Slot const q = slots_q.slot(entry), k = slots_k.slot(entry);
  Sequence const sequence{0, q.first, k.first, q.used, k.used};
  WindowRanges const ranges =
      entry < call.sizes.batch ? ranges_of(call, sequence, entry) : WindowRanges(0, 0, 0, 0);
  return {0,
          q,
          k,
          ranges,
          slots_q.first_block(entry, tile_m),
          packed_tma_rows(q.first, q.used),
          packed_tma_rows(k.first, k.used),
          packed_tma_rows(k.first, k.rows)};
}

/// The slot of a query block, whose number among those of a head becomes its number in the slot.
constexpr Slot slot_of_queries(AttentionCall const& call, int& block, int tile_m) {
  if (!call.is_packed()) return {0, call.sizes.seqlen_q, call.sizes.seqlen_q};
  PackedSlots const slots = slots_of_q(call);
  int const number = slots.slot_of(block, tile_m);
  block -= slots.first_block(number, tile_m);
  return slots.slot(number);
}

/// dQ in order: how many key blocks (of `keys` keys) add to a query block before number `key_block`
/// does, one of those that see it. Those that do follow one another, and a left end of the mask
/// hides the first ones.
constexpr int turn_of(WindowRanges const& ranges, int key_block, int keys, int query_block,
                      int tile_m) {
  return key_block - ranges.key_blocks(query_block * tile_m, tile_m, keys).begin;
}

}  // namespace cute_kernels::attention
