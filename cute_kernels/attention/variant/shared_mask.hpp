#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/attention/variant/block_lists.hpp"
#include "cute_kernels/attention/variant/place.hpp"
#include "cute_kernels/attention/variant/variant.hpp"

namespace cute_kernels::attention {

/// A mask hook that does not ask for the head shows all heads the same. So it is asked once for all
/// of them, before the attention kernel, about the units at both ends of each list: there are the
/// diagonal, a window's left end, and where documents begin. What it shows is a bit for each
/// element, in the order in which the threads of the attention kernel hold a block's: a list's unit
/// has rows, of queries, or backward of keys, and an entry's unit blocks of kTileN columns. About
/// other units each tile asks for itself.
template <int kTileN>
struct SharedMask {
  static constexpr int kEnd = 8;  // entries of a list at each end
  static constexpr int kSlots = 2 * kEnd;
  static constexpr int kThreads = 256;  // that hold a block: two warpgroups of 64 rows
  static constexpr int kColumns = kTileN / 4;
  static constexpr int kWords = (2 * kColumns + 31) / 32;  // of a thread's part
  static constexpr int kBlocksOfUnit = kMaskUnit / kTileN;
  static constexpr int kWordsOfRow = kSlots * kBlocksOfUnit * kThreads * kWords;
  static_assert(kMaskUnit % kTileN == 0);

  /// Where an entry's bits are, of a list with `count` of them; -1: nowhere.
  static constexpr int slot_of(int entry, int count) {
    int const from_end = count - 1 - entry;
    return entry < kEnd ? entry : from_end < kEnd ? kSlots - 1 - from_end : -1;
  }
  /// The entry whose bits are there, or -1.
  static constexpr int entry_of(int slot, int count) {
    int const entry = slot < kEnd ? slot : count - kSlots + slot;
    return entry < count && (slot < kEnd || entry >= kEnd) ? entry : -1;
  }

  /// The words of a thread, of a block of an entry's unit.
  static constexpr int place(int row, int slot, int block, int thread) {
    return ((((row * kSlots + slot) * kBlocksOfUnit + block) * kThreads) + thread) * kWords;
  }
  /// Of these rows place() is an int.
  static constexpr int64_t kMostRows = (int64_t{1} << 31) / kWordsOfRow;
};

/// Whether kernels of a variant may share what its mask hook says.
template <class Variant>
constexpr bool shares_mask() {
  if constexpr (Variant::kHides && Variant::kHasBlockMask) {
    return !Variant::Hooks::kMaskAsksHead;
  } else {
    return false;
  }
}

enum class MaskRows { kQueries, kKeys };

/// Units of a batch entry's rows.
template <MaskRows kRows>
constexpr int mask_units(CallSizes const& sizes) {
  return ((kRows == MaskRows::kQueries ? sizes.seqlen_q : sizes.seqlen_k) + kMaskUnit - 1) /
         kMaskUnit;
}

/// Rows of lists, whose bits a call has memory for; 0: its tiles ask for themselves, as lists
/// differ from head to head, batch entries have lists but no mask in common, too few would share,
/// or the bits would be more than Q is, or backward as many rows of keys: each short sequence has a
/// whole unit.
template <class Variant, int kTileN, MaskRows kRows = MaskRows::kQueries>
int64_t rows_of_shared_mask(AttentionCall const& call, BlockLists const& lists) {
  if constexpr (shares_mask<Variant>()) {
    constexpr int kFewHeads = 2;
    CallSizes const& sizes = call.sizes;
    int64_t rows = mask_units<kRows>(sizes);
    bool shares =
        rows > 0 && lists.counts != nullptr && lists.rows_of_head == 0 && sizes.heads_q > kFewHeads;
    if (lists.rows_of_batch != 0) {
      rows += int64_t{lists.rows_of_batch} * (sizes.batch - 1);
    } else {
      shares &= sizes.batch == 1 || !Variant::Hooks::kMaskAsksBatch;
    }
    int64_t const own_rows =
        int64_t{sizes.batch} * (kRows == MaskRows::kQueries ? sizes.seqlen_q : sizes.seqlen_k);
    int64_t const own_words = own_rows * sizes.heads_q * sizes.head_dim / 2;  // of 16 bits
    shares &= rows * SharedMask<kTileN>::kWordsOfRow <= own_words;
    return shares && rows <= SharedMask<kTileN>::kMostRows ? rows : 0;
  } else {
    return 0;
  }
}

/// The memory of these bits. Of other variants `variant` is null, and tiles need not be parts of a
/// unit.
template <class Variant, int kTileN, MaskRows kRows = MaskRows::kQueries>
int64_t bytes_of_shared_mask(AttentionCall const& call, VariantArguments const* variant) {
  if constexpr (shares_mask<Variant>()) {
    return rows_of_shared_mask<Variant, kTileN, kRows>(call, variant->blocks) *
           SharedMask<kTileN>::kWordsOfRow * int64_t{sizeof(uint32_t)};
  } else {
    return 0;
  }
}

/// Asks for all heads: the work of some CTAs, each of which looks at a few slots of a list. Forward
/// the bits know the call's own mask, too.
template <class Variant, int kTileN, MaskRows kRows = MaskRows::kQueries>
class AskMask {
  using Bits = SharedMask<kTileN>;

 public:
  static constexpr int kParts = 4;  // CTAs of a list
  static constexpr int kThreads = Bits::kThreads;

  AttentionCall call;
  VariantArguments variant;
  uint32_t* words;
  int units;    // of a batch entry's rows
  int entries;  // of the batch: 1 where all have the same

  AskMask(AttentionCall const& call, VariantArguments const& variant, uint32_t* words)
      : call(call),
        variant(variant),
        words(words),
        units(mask_units<kRows>(call.sizes)),
        entries(variant.blocks.rows_of_batch == 0 ? 1 : call.sizes.batch) {}

  int64_t ctas() const { return int64_t{units} * entries * kParts; }

  CUTLASS_DEVICE void operator()(int cta, int /*ctas*/, int /*threads*/) const {
    int const part = cta % kParts, unit = cta / kParts % units, batch = cta / kParts / units;
    BlockRow const list(variant.blocks, batch, 0, unit);
    Sequence const sequence = sequence_of(call, batch);
    WindowMask const mask(ranges_of(call, sequence, batch));
    SequencePlace const places(variant, batch, 0, sequence);
    int const count = list.count(), thread = threadIdx.x, lane = thread % 32;
    int const row = unit * kMaskUnit + thread / 32 * 16 + lane / 4;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int slot = part; slot < Bits::kSlots; slot += kParts) {
      int const i = Bits::entry_of(slot, count);
      if (i < 0) continue;
      BlockEntry const entry = list.entry(i);
      if (entry.is_full()) continue;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int block = 0; block < Bits::kBlocksOfUnit; ++block) {
        int const column = entry.unit() * kMaskUnit + block * kTileN + lane % 4 * 2;
        ask(places, mask, row, column, words + Bits::place(list.number(), slot, block, thread));
      }
    }
  }

 private:
  CUTLASS_DEVICE void ask(SequencePlace const& places, WindowMask const& mask, int first_row,
                          int first_column, uint32_t* to) const {
    uint32_t shown[Bits::kWords] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < 2; ++row) {
      int const own = first_row + 8 * row;
      uint32_t const seen = kRows == MaskRows::kKeys ? ~uint32_t{0}
                                                     : columns_between<Bits::kColumns>(
                                                           mask.first_key(own) - first_column,
                                                           mask.end_key(own) - first_column);
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < Bits::kColumns; ++col) {
        int const i = row * Bits::kColumns + col;
        int const other = first_column + 8 * (col / 2) + col % 2;
        auto const here = kRows == MaskRows::kKeys ? places.template at<Variant>(other, own)
                                                   : places.template at<Variant>(own, other);
        if (Variant::Hooks::mask(here, variant)) {
          shown[i / 32] |= (seen >> col & 1) << i % 32;
        }
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Bits::kWords; ++i) to[i] = shown[i];
  }
};

/// What a tile knows of a unit's block without asking: nothing, or the thread's words of it.
template <int kTileN>
struct KnownMask {
  uint32_t const* words;  // null: nothing. All threads of a warp know it, or none does

  /// Fills `shown`, if there is anything to fill it with. Not through L1, where nobody reads them
  /// twice.
  CUTLASS_DEVICE bool operator()(uint32_t (&shown)[SharedMask<kTileN>::kWords]) const {
    if (words == nullptr) return false;
    if constexpr (SharedMask<kTileN>::kWords == 2) {
      uint2 const pair = __ldcg(reinterpret_cast<uint2 const*>(words));
      shown[0] = pair.x;
      shown[1] = pair.y;
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < SharedMask<kTileN>::kWords; ++i) shown[i] = __ldcg(words + i);
    }
    return true;
  }
};

}  // namespace cute_kernels::attention
