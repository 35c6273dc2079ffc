#pragma once

#include <cstdint>

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/cache/problem.hpp"

// Where rows come from and go, whatever the lengths and tables hold. Nothing here needs a CUDA
// compiler.
namespace cute_kernels::cache {

inline constexpr int kVector = 8;  // 16-bit elements

/// Where a token is: its sequence and its number there; -1 if no sequence has it.
struct TokenPlace {
  int entry;
  int index;
};

constexpr TokenPlace place_of(Tokens const& tokens, int token) {
  if (tokens.cu_seqlens == nullptr) return {token / tokens.seqlen, token % tokens.seqlen};
  if (tokens.batch == 0) return {-1, 0};
  int const entry = attention::entry_at(tokens.cu_seqlens, tokens.batch, token);
  attention::RowSpan const rows =
      attention::packed_rows(tokens.cu_seqlens, nullptr, tokens.total, entry);
  int const index = token - rows.first;
  return {index >= 0 && index < rows.count ? entry : -1, index};
}

/// Where a token is in the tensor that it comes from.
struct SourceRow {
  int batch;
  int row;
};

constexpr SourceRow source_row(Tokens const& tokens, int token) {
  if (tokens.cu_seqlens != nullptr) return {0, token};
  return {token / tokens.seqlen, token % tokens.seqlen};
}

/// How many tokens a sequence has.
constexpr int rows_of_entry(Tokens const& tokens, int entry) {
  if (tokens.cu_seqlens == nullptr) return tokens.seqlen;
  return attention::packed_rows(tokens.cu_seqlens, nullptr, tokens.total, entry).count;
}

/// A row of a cache: its page or entry and its number there; -1 if it does not exist.
struct CacheRow {
  int page;
  int row;
};

constexpr CacheRow cache_row(Places const& places, int entry, int64_t wanted) {
  if (wanted < 0 || wanted >= places.capacity) return {-1, 0};
  int page = entry, row = static_cast<int>(wanted);
  if (places.page_table != nullptr) {
    page = places.page_table[entry * places.page_table_stride + row / places.page_size];
    row %= places.page_size;
  } else if (places.cache_batch_idx != nullptr) {
    page = places.cache_batch_idx[entry];
  }
  return {page >= 0 && page < places.pages ? page : -1, row};
}

/// The length of a sequence to which `added` rows are appended, as far as there is room.
constexpr int length_after(Places const& places, int length, int added) {
  int64_t const after = int64_t{length} + added;
  return static_cast<int>(after < 0 ? 0 : after > places.capacity ? places.capacity : after);
}

/// The row of the tables for a position; -1 where they have none.
constexpr int table_row(Rotary const& rotary, int64_t position) {
  return position >= 0 && position < rotary.positions ? static_cast<int>(position) : -1;
}

/// Pairs of channels that are a vector's apart, as they are unless interleaved.
constexpr int distant_pairs(Rotary const& rotary) { return rotary.interleaved ? 0 : rotary.pairs; }

constexpr int units_of_head(int head_dim, int distant_pairs) {
  return (head_dim - distant_pairs) / kVector;
}

constexpr int units_of_row(Rows const& rows, int distant_pairs) {
  return rows.heads * units_of_head(rows.head_dim, distant_pairs);
}

/// What a thread moves at once: a vector, or two whose channels are distant pairs.
struct UnitPlace {
  int head;
  int channel;
  int second_channel;  // -1: there is one vector

  constexpr bool is_pair() const { return second_channel >= 0; }
};

/// Unit `index` of a row of heads.
constexpr UnitPlace unit_place(int head_dim, int distant_pairs, int index) {
  int const per_head = units_of_head(head_dim, distant_pairs);
  int const head = index / per_head, channel = index % per_head * kVector;
  if (channel < distant_pairs) return {head, channel, channel + distant_pairs};
  return {head, channel + distant_pairs, -1};
}

}  // namespace cute_kernels::cache
