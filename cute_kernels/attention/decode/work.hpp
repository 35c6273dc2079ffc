#pragma once

#include <cstdint>

#include "cute_kernels/attention/decode/problem.hpp"
#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/ranges.hpp"

// The work of a call to a cache, and how it is dealt to CTAs: one arithmetic on the device and on
// the host. Nothing here needs a CUDA compiler.
//
// The query heads of a key head share a tile's rows: row r of a sequence is its query r / group,
// head r % group of the group. An item is a tile of rows of one sequence and key head, with all
// keys that some of its rows see, in blocks. The blocks of all items stand in one line, by key
// head, sequence, tile and key. Each CTA takes a share of the line, all of them of the same length,
// wherever it begins or ends. So an item may be in parts, and of a CTA's parts only the first one
// and the last one are less than an item.
namespace cute_kernels::attention {

// Of a loop that mostly has one round, or none.
#ifdef __CUDACC__
#define CUTE_KERNELS_FEW_ROUNDS _Pragma("unroll 1")
#else
#define CUTE_KERNELS_FEW_ROUNDS
#endif

/// a / b, where a >= 0 and b > 0. Half of the instructions of a division, and of its time: rounding
/// seldom leaves anything to do for the loops, and never much.
constexpr int quotient(int a, int b) {
  int result = static_cast<int>((static_cast<float>(a) + 0.5f) / static_cast<float>(b));
  int rest = a - result * b;
  CUTE_KERNELS_FEW_ROUNDS
  for (; rest < 0; rest += b) --result;
  CUTE_KERNELS_FEW_ROUNDS
  for (; rest >= b; rest -= b) ++result;
  return result;
}

/// The keys from `begin` up to before `end`.
struct KeySpan {
  int begin;
  int end;

  constexpr bool empty() const { return begin >= end; }
};

/// One sequence of a call: its queries, and which keys they see.
struct CachedSequence {
  int row_q;      // of Q, its first query
  int first_key;  // behind the left padding
  int group;      // query heads of a key head
  WindowRanges ranges;
  int chunk = 0;  // a query sees keys of its own chunk alone, of so many; 0: there are none

  constexpr int rows() const { return ranges.seqlen_q * group; }

  constexpr KeySpan seen_by(int query) const {
    KeySpan const seen{greater(first_key, ranges.first_key(query)), ranges.end_key(query)};
    if (chunk == 0) return seen;
    int const position = query + ranges.seqlen_k - ranges.seqlen_q - first_key;
    int const in_chunk = (position % chunk + chunk) % chunk;
    int const begin = first_key + position - in_chunk;
    return {greater(seen.begin, begin), lesser(seen.end, begin + chunk)};
  }
  /// What some query from `first` to `last` sees. Neither end of what a query sees decreases.
  constexpr KeySpan seen_by_some(int first, int last) const {
    // One branch, not two.
    if (chunk == 0) return {greater(first_key, ranges.first_key(first)), ranges.end_key(last)};
    return {seen_by(first).begin, seen_by(last).end};
  }
  constexpr KeySpan seen_by_all(int first, int last) const {
    return {seen_by(last).begin, seen_by(first).end};
  }
};

inline constexpr CachedSequence kNoSequence{0, 0, 1, WindowRanges(0, 0, 0, 0)};

/// Whatever the lengths hold, all rows lie in the tensors.
constexpr CachedSequence cached_sequence(CachedCall const& call, int entry) {
  CacheLengths const& lengths = call.lengths;
  RowSpan q = packed_rows(lengths.cu_seqlens_q, nullptr, call.total_q, entry);
  int const rows = q.count * call.group;
  if (rows < call.least_rows || rows > call.most_rows) q.count = 0;
  int const keys = lesser(greater(0, lengths.used[entry]), call.most_keys);
  int const leftpad =
      lengths.leftpad == nullptr ? 0 : lesser(greater(0, lengths.leftpad[entry]), keys);
  return {q.first, leftpad, call.group, WindowRanges(call.mask, keys - q.count, q.count, keys),
          call.chunk};
}

/// A tile of one sequence's rows, and the keys that some of them see, in blocks from the first of
/// these on.
template <class Tiling>
struct RowTile {
  int first_row;
  int rows;
  int first_query;
  int last_query;
  KeySpan keys;

  constexpr RowTile(CachedSequence const& sequence, int tile)
      : first_row(tile * Tiling::kTileRows),
        rows(lesser(Tiling::kTileRows, sequence.rows() - first_row)),
        // Without a division in the case of one tile.
        first_query(is_only(sequence) ? 0 : quotient(first_row, sequence.group)),
        last_query(is_only(sequence) ? sequence.ranges.seqlen_q - 1
                                     : quotient(first_row + rows - 1, sequence.group)),
        keys(sequence.seen_by_some(first_query, last_query)) {}

  /// At least 1: rows that see nothing are written too.
  constexpr int blocks() const {
    return keys.empty() ? 1 : (keys.end - keys.begin + Tiling::kTileN - 1) / Tiling::kTileN;
  }

  /// Whether all rows of a sequence are in one tile.
  static constexpr bool is_only(CachedSequence const& sequence) {
    return sequence.rows() <= Tiling::kTileRows;
  }
  static constexpr int count(CachedSequence const& sequence) {
    return (sequence.rows() + Tiling::kTileRows - 1) / Tiling::kTileRows;
  }
};

/// The line of all blocks.
struct WorkLine {
  int of_head;  // blocks of a head: all heads have the same
  int blocks;
  int share;   // of one CTA, at least 1
  bool whole;  // no item is in parts: a CTA has those that begin in its share

  /// Shares of about the same length for as many as `ctas` CTAs, but so long that no item is in
  /// more than `num_splits` parts, of which 0 is any number. Then they may be a little longer,
  /// where all heads are divided alike so: their rows of a page, which are neighbours in memory,
  /// are read at the same time. Or of one head all items, if they are equal: of `batch` sequences
  /// those of one tile. So as few of them as can be are in parts. `part_cost`: see CachedCall.
  constexpr WorkLine(int of_head, int heads, int longest_item, int batch, int ctas, int num_splits,
                     int part_cost)
      : of_head(of_head),
        blocks(of_head * heads),
        share(quotient(blocks + ctas - 1, ctas)),
        whole(num_splits == 1) {
    if (share < 1) share = 1;
    if (num_splits == 0) {
      // The sum of a share's time and of that of longest_item / share parts is least here.
      CUTE_KERNELS_FEW_ROUNDS
      while (int64_t{share} * share * 64 < int64_t{longest_item} * part_cost) ++share;
    }
    if (num_splits > 1) {
      share = greater(share, quotient(longest_item + num_splits - 2, num_splits - 1));
    } else if (heads > 1) {
      divide_alike(of_head);
    } else if (of_head == int64_t{longest_item} * batch) {
      divide_alike(longest_item);
    }
  }

  constexpr int begin(int cta) const {
    int64_t const block = int64_t{cta} * share;
    return block < blocks ? static_cast<int>(block) : blocks;
  }
  constexpr int end(int cta) const {
    return blocks - begin(cta) > share ? begin(cta) + share : blocks;
  }

 private:
  /// Shares a little longer if each run of so many blocks then is divided alike.
  constexpr void divide_alike(int run) {
    constexpr int kParts = 16;  // a little: one part of these
    if (run == 0) return;
    int const even = share <= run ? quotient(run - 1, quotient(run, share)) + 1
                                  : quotient(share - 1, run) * run + run;
    if (even - share <= share / kParts) share = even;
  }
};

/// The CTAs that have parts of an item: `count` of them, from `first` on.
struct WorkParts {
  int first;
  int count;

  constexpr WorkParts(WorkLine const& line, int item, int blocks)
      : first(quotient(item, line.share)),
        count(line.whole ? 1 : quotient(item + blocks - 1, line.share) - first + 1) {}
};

/// Where in the line a CTA begins.
struct WorkPlace {
  int block;  // of the line
  int item;   // the block where its item begins
  int entry;  // of the batch
  int head;   // of K and V
  int tile;
  CachedSequence sequence;
};

/// A sequence, how many blocks it has for each head, and how many its longest item has.
struct SequenceWork {
  CachedSequence sequence;
  int blocks;
  int longest;
};

template <class Tiling>
constexpr SequenceWork work_of(CachedCall const& call, int entry) {
  SequenceWork work{cached_sequence(call, entry), 0, 0};
  CUTE_KERNELS_FEW_ROUNDS
  for (int tile = 0; tile < RowTile<Tiling>::count(work.sequence); ++tile) {
    int const of_tile = RowTile<Tiling>(work.sequence, tile).blocks();
    work.blocks += of_tile;
    work.longest = greater(work.longest, of_tile);
  }
  return work;
}

/// The place of a block that a sequence and head have in the line, where they start at `start`.
template <class Tiling>
constexpr WorkPlace place_in_sequence(CachedSequence const& sequence, int entry, int head,
                                      int start, int block) {
  WorkPlace place{block, block, entry, head, 0, sequence};
  int rest = block - start;
  if (!RowTile<Tiling>::is_only(sequence)) {
    CUTE_KERNELS_FEW_ROUNDS
    for (;; ++place.tile) {
      int const of_tile = RowTile<Tiling>(sequence, place.tile).blocks();
      if (rest < of_tile) break;
      rest -= of_tile;
    }
  }
  place.item = block - rest;
  return place;
}

/// The place behind the line's end.
constexpr WorkPlace end_of_line(WorkLine const& line) {
  return {line.blocks, line.blocks, 0, 0, 0, kNoSequence};
}

/// A CTA's parts of items, in the order of the line.
template <class Tiling>
class WorkWalk {
 public:
  constexpr WorkWalk(CachedCall const& call, WorkLine const& line, WorkPlace const& place, int cta)
      : call_(call),
        line_(line),
        end_(line.end(cta)),
        item_(place.item),
        begin_(static_cast<int>(place.block - place.item)),
        entry_(place.entry),
        head_(place.head),
        tile_number_(place.tile),
        sequence_(place.sequence),
        tile_(sequence_, tile_number_) {
    if (line_.whole && begin_ > 0 && valid()) advance();
  }

  constexpr bool valid() const { return item_ + begin_ < end_; }

  constexpr void advance() {
    item_ += tile_.blocks();
    begin_ = 0;
    if (!valid()) return;
    if (++tile_number_ == RowTile<Tiling>::count(sequence_)) {
      tile_number_ = 0;
      do {
        if (++entry_ == call_.batch) {
          entry_ = 0;
          ++head_;
        }
        sequence_ = cached_sequence(call_, entry_);
      } while (sequence_.rows() == 0);
    }
    tile_ = RowTile<Tiling>(sequence_, tile_number_);
  }

  constexpr int entry() const { return entry_; }
  constexpr int head() const { return head_; }
  constexpr CachedSequence const& sequence() const { return sequence_; }
  constexpr RowTile<Tiling> const& tile() const { return tile_; }

  /// The part's blocks of the item; none where the rows see no key.
  constexpr int begin_block() const { return begin_; }
  constexpr int end_block() const {
    if (tile_.keys.empty()) return begin_;
    int const blocks = tile_.blocks();
    return line_.whole || end_ - item_ > blocks ? blocks : static_cast<int>(end_ - item_);
  }
  /// Whether the item begins with this part.
  constexpr bool is_first_part() const { return begin_ == 0; }
  constexpr WorkParts parts() const { return WorkParts(line_, item_, tile_.blocks()); }

 private:
  CachedCall const& call_;
  WorkLine const& line_;
  int end_;
  int item_;
  int begin_;
  int entry_;
  int head_;
  int tile_number_;
  CachedSequence sequence_;
  RowTile<Tiling> tile_;
};

#undef CUTE_KERNELS_FEW_ROUNDS

/// What a consumer warpgroup computes of a part: 64 of the tile's rows, or those of one of its key
/// heads, of all blocks; where there are no more rows than 64, two warpgroups take turns with the
/// blocks.
template <class Tiling>
struct WarpgroupPart {
  int first_row;  // of the tile
  int begin;      // its first block, or behind the part's end
  int turns;      // 1: all blocks are its own, else every so many

  constexpr WarpgroupPart(WorkWalk<Tiling> const& walk, int warpgroup)
      : first_row(0), begin(walk.begin_block()), turns(1) {
    if (Tiling::kHeads > 1) return;
    if (Tiling::kConsumers > 2 || walk.tile().rows > Tiling::kWarpgroupM) {
      first_row = warpgroup * Tiling::kWarpgroupM;
    } else {
      begin += warpgroup;
      turns = Tiling::kConsumers;
    }
  }

  constexpr bool takes_turns() const { return turns > 1; }
};

}  // namespace cute_kernels::attention
