#pragma once

#include <cstdint>

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/ranges.hpp"

// The tiles of a call whose sequences differ, in the order in which they are done. Nothing here
// needs a CUDA compiler.
namespace cute_kernels::attention {

/// A tile of one sequence, of all heads: what kernels need to know of it. A tile of queries may
/// begin before the first one. Tiling::kNumbersSequences: also of packed sequences, `batch` is
/// which one it is.
struct alignas(16) WorkTile {
  int first_row;  // in the sequence
  Sequence sequence;
  int left_edge;
  int right_edge;

  constexpr WindowRanges ranges() const {
    return WindowRanges(sequence.seqlen_q, sequence.seqlen_k, left_edge, right_edge);
  }
};
static_assert(sizeof(WorkTile) == 32);

/// Forward: queries in tiles of kTileM, whose length is how many blocks of kTileN keys they see.
template <int kTileM, int kTileN>
struct QueryTiling {
  static constexpr bool kNumbersSequences = false;

  static constexpr int count(Sequence const& sequence) {
    return (sequence.seqlen_q + kTileM - 1) / kTileM;
  }
  static constexpr int first_row(Sequence const& sequence, int tile) {
    return first_query_of_tile(sequence.seqlen_q, kTileM, count(sequence), tile);
  }
  template <class Ranges>
  static constexpr int length(Ranges const& ranges, int first_row) {
    BlockRange const keys = ranges.key_blocks(first_row, kTileM, kTileN);
    return keys.end - keys.begin;
  }

  /// Tiles of a sequence that stand beside one another in the list and share the loads of K and V:
  /// enough queries for a load.
  static constexpr int kNeighbours = 2 * kTileM >= kQueriesForALoad ? 2 : 4;

  /// The last of a tile's neighbours: of `count` tiles, the last ones are the first group.
  static constexpr int last_neighbour(int tile, int count) {
    return count - 1 - (count - 1 - tile) / kNeighbours * kNeighbours;
  }
};

template <int kTileM, int kTileN>
struct NumberedQueryTiling : QueryTiling<kTileM, kTileN> {
  static constexpr bool kNumbersSequences = true;
};

/// How many tiles of tile_m queries a call may have.
constexpr int64_t most_tiles(AttentionCall const& call, int tile_m) {
  int64_t const batch = call.sizes.batch, rows = tensor_rows_q(call);
  return call.is_packed() ? rows / tile_m + batch : batch * ((rows + tile_m - 1) / tile_m);
}

/// The work of one CTA at a time: one head of an entry of the list.
struct ListedTile {
  int entry;
  int head;
};

/// The one at a place in the order, of a list of `count` tiles. Some neighbours in the list take
/// turns with the heads: they are mostly of one sequence, and share the loads of K and V in L2.
/// `group` divides by kNeighbours times the heads. Every tile begins with this, so what is divided
/// by otherwise is a constant, but for the last neighbours.
template <int kNeighbours, class Divisor>
constexpr ListedTile listed_tile(int place, int count, Divisor const& group) {
  int const number = group.div(place);
  auto const rest = static_cast<unsigned>(place - number * group.divisor);
  int const first = number * kNeighbours;
  auto at = [&](unsigned neighbours) {
    return ListedTile{first + static_cast<int>(rest % neighbours),
                      static_cast<int>(rest / neighbours)};
  };
  int const neighbours = count - first;
  return neighbours >= kNeighbours ? at(kNeighbours) : at(static_cast<unsigned>(neighbours));
}

/// Where the list lies, in memory of the device's that is a multiple of 16.
struct WorkList {
  int* count;   // of the tiles
  int* starts;  // (batch + 1): of each sequence's tiles, before they are sorted
  WorkTile* tiles;
  int most;  // of the tiles that there is room for
};

constexpr int64_t work_list_bytes(int64_t batch, int64_t most) {
  return (batch + 2 + 3) / 4 * 16 + most * static_cast<int64_t>(sizeof(WorkTile));
}

inline WorkList work_list_at(void* memory, int batch, int64_t most) {
  int* const count = static_cast<int*>(memory);
  char* const tiles = static_cast<char*>(memory) + work_list_bytes(batch, 0);
  return {count, count + 1, reinterpret_cast<WorkTile*>(tiles), static_cast<int>(most)};
}

/// Fills a WorkList, the longest tiles first: neighbours by the length of the last of them, those
/// of about the same length in the order of the sequences and of their rows. The work of one CTA in
/// phases, between which all threads meet: what one phase leaves for another is in Shared and in
/// the list. So the host can run it too.
///
/// The attention kernel waits for it, so what counts is how long one thread takes: nothing is
/// divided by a number that only the call knows but lengths into classes, a tile's sequence is
/// sought once and in shared memory, and who adds up others' numbers has read them all by then.
///
/// Of calls it knows sequences(), sequence_of() and ranges_of().
template <class Tiling, class Call = AttentionCall>
class WorkListBuilder {
 public:
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 10;

 private:
  static constexpr int kGroup = 32;
  static constexpr int kGroups = kThreads / kGroup;
  static constexpr int kBuckets = 32;   // classes of length, the longest first, at most
  static constexpr int kNearby = 1023;  // sequences

 public:
  struct Shared {
    alignas(16) int of_thread[kThreads];
    alignas(16) int of_group[kGroups];
    int before_in_group[kThreads];  // of_thread of the threads before one, added up
    int entry[kThreads];            // the sequence of a thread's first tile
    int starts[kNearby + 1];        // WorkList::starts, if they fit
    int total;
    int longest;
    // By bucket and thread: how many tiles, then the place of the next one. Padded, as a thread
    // adds up kBuckets neighbours.
    int counters[kThreads * (kBuckets + 1)];
  };

  constexpr WorkListBuilder(Call const& call, WorkList const& list, Shared& shared)
      : call_(call), list_(list), shared_(shared) {}

  template <int kPhase>
  constexpr void phase(int thread) {
    static_assert(kPhase >= 0 && kPhase < kPhases);
    if constexpr (kPhase == 0) {
      int tiles = 0;
      each_sequence(thread, [&](int, int count) { tiles = add(tiles, count); });
      shared_.of_thread[thread] = tiles;
    } else if constexpr (kPhase == 1 || kPhase == 7) {
      scan_group(thread);
    } else if constexpr (kPhase == 2) {
      int start = before(thread);
      each_sequence(thread, [&](int entry, int count) {
        starts()[entry] = start;
        start = add(start, count);
      });
      if (thread == 0) {
        shared_.total = of_groups_before(kGroups);
        starts()[sequences(call_)] = *list_.count = shared_.total;
      }
    } else if constexpr (kPhase == 3) {
      int const tile = first_tile(thread);
      shared_.entry[thread] = entry_at(starts(), sequences(call_), tile);
      int longest = 0;
      each_tile(thread, [&](WorkTile const&, int length) { longest = greater(longest, length); });
      shared_.of_thread[thread] = longest;
    } else if constexpr (kPhase == 4) {
      if (thread % kGroup == 0) {
        shared_.of_group[thread / kGroup] = longest_of<kGroup>(shared_.of_thread + thread);
      }
    } else if constexpr (kPhase == 5) {
      for (int bucket = 0; bucket < kBuckets; ++bucket) counter(bucket, thread) = 0;
      int const longest = longest_of<kGroups>(shared_.of_group);
      if (thread == 0) shared_.longest = longest;
      each_tile(thread, [&](WorkTile const&, int length) {
        ++counter(bucket_of(length, longest), thread);
      });
    } else if constexpr (kPhase == 6) {
      int sum = 0;
      for (int i = 0; i < kBuckets; ++i) sum += neighbour(thread, i);
      shared_.of_thread[thread] = sum;
    } else if constexpr (kPhase == 8) {
      int place = before(thread);
      for (int i = 0; i < kBuckets; ++i) {
        int const count = neighbour(thread, i);
        neighbour(thread, i) = place;
        place += count;
      }
    } else {
      each_tile(thread, [&](WorkTile const& tile, int length) {
        list_.tiles[counter(bucket_of(length, shared_.longest), thread)++] = tile;
      });
    }
  }

 private:
  /// No more than there is room for, whatever cu_seqlens holds.
  constexpr int add(int a, int b) const { return b > list_.most - a ? list_.most : a + b; }
  constexpr int no_more(int64_t sum) const {
    return sum > list_.most ? list_.most : static_cast<int>(sum);
  }

  template <class Visit>
  constexpr void each_sequence(int thread, Visit const& visit) const {
    int const share = (sequences(call_) + kThreads - 1) / kThreads;
    int const first = lesser(thread * share, sequences(call_));
    int const end = lesser(first + share, sequences(call_));
    for (int entry = first; entry < end; ++entry) {
      visit(entry, Tiling::count(sequence_of(call_, entry)));
    }
  }

  constexpr int* starts() { return sequences(call_) <= kNearby ? shared_.starts : list_.starts; }

  constexpr int share_of_tiles() const { return (shared_.total + kThreads - 1) / kThreads; }
  constexpr int first_tile(int thread) const {
    return lesser(thread * share_of_tiles(), shared_.total);
  }

  /// A thread's share of the tiles: some that follow one another, before they are sorted. Behind
  /// phase 3; the first one's sequence is known. With the length of the last of its neighbours.
  template <class Visit>
  constexpr void each_tile(int thread, Visit const& visit) {
    int const end = first_tile(thread + 1);
    int entry = shared_.entry[thread];
    for (int i = first_tile(thread); i < end; ++entry) {
      Sequence sequence = sequence_of(call_, entry);
      if constexpr (Tiling::kNumbersSequences) sequence.batch = entry;
      auto const ranges = ranges_of(call_, sequence, entry);
      int const start = starts()[entry], count = starts()[entry + 1] - start;
      for (int const stop = lesser(end, start + count); i < stop; ++i) {
        auto first_row = [&](int tile) { return Tiling::first_row(sequence, tile); };
        int const last = Tiling::last_neighbour(i - start, count);
        visit(WorkTile{first_row(i - start), sequence, ranges.left_edge, ranges.right_edge},
              Tiling::length(ranges, first_row(last)));
      }
    }
  }

  static constexpr int bucket_of(int length, int longest) {
    // Blocks have 16 keys or more: there are at most 2^27 of them.
    auto const shorter = static_cast<uint32_t>(longest - length);
    return static_cast<int>(shorter * kBuckets / static_cast<uint32_t>(longest + 1));
  }

  constexpr int& counter(int bucket, int thread) {
    int const i = bucket * kThreads + thread;
    return neighbour(i / kBuckets, i % kBuckets);
  }
  /// One of the kBuckets counters that a thread adds up.
  constexpr int& neighbour(int thread, int i) {
    return shared_.counters[thread * (kBuckets + 1) + i];
  }

  // Sums of of_thread over the threads before one: those of its group in a phase, then those of the
  // groups before. Each thread adds up for itself, in an order of no consequence, what all read.
  constexpr void scan_group(int thread) {
    int const lane = thread % kGroup;
    int64_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
      sum += i < lane ? shared_.of_thread[thread - lane + i] : 0;
    }
    shared_.before_in_group[thread] = no_more(sum);
    if (lane == kGroup - 1) {
      shared_.of_group[thread / kGroup] = no_more(sum + shared_.of_thread[thread]);
    }
  }
  constexpr int of_groups_before(int end) const {
    int64_t sum = 0;
    for (int i = 0; i < kGroups; ++i) sum += i < end ? shared_.of_group[i] : 0;
    return no_more(sum);
  }
  constexpr int before(int thread) const {
    return add(shared_.before_in_group[thread], of_groups_before(thread / kGroup));
  }

  template <int kCount>
  static constexpr int longest_of(int const* lengths) {
    int longest = 0;
    for (int i = 0; i < kCount; ++i) longest = greater(longest, lengths[i]);
    return longest;
  }

  Call const& call_;
  WorkList list_;
  Shared& shared_;
};

}  // namespace cute_kernels::attention
