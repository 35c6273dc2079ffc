#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/lengths.hpp"
#include "cute_kernels/attention/variant/arguments.hpp"

namespace cute_kernels::attention {

/// What an axis of a captured tensor counts: a call's own coordinates, or anything (kFree).
enum class Axis { kBatch, kHead, kQuery, kKey, kQueryRow, kKeyRow, kFree };

/// A coordinate of a score, an int but for its type, which tells which one it is: an axis that
/// counts the same can be indexed without a look at its size.
template <Axis kAxis>
struct Coordinate {
  int value;
  CUTLASS_HOST_DEVICE constexpr operator int() const { return value; }
};

/// Of one score: the batch entry or number of the packed sequence, the head of Q, numbers of query
/// and key in the sequence, and of their rows in the tensors, which differ in packed sequences.
/// `position` is that of the query among the keys: the last query's is the last key's.
struct Place {
  Coordinate<Axis::kBatch> batch;
  Coordinate<Axis::kHead> head;
  Coordinate<Axis::kQuery> query;
  Coordinate<Axis::kKey> key;
  Coordinate<Axis::kQueryRow> query_row;
  Coordinate<Axis::kKeyRow> key_row;
  int position;
  int seqlen_q;
  int seqlen_k;
};

/// What the places of a tile of one head have in common.
struct SequencePlace {
  int batch;
  int head;
  Sequence sequence;
  int last_query;  // that may index a captured tensor
  int last_key;

  CUTLASS_DEVICE SequencePlace(VariantArguments const& call, int batch, int head,
                               Sequence const& sequence)
      : batch(batch),
        head(head),
        sequence(sequence),
        last_query(lesser(sequence.seqlen_q, call.most_queries) - 1),
        last_key(lesser(sequence.seqlen_k, call.most_keys) - 1) {}

  CUTLASS_DEVICE SequencePlace of_head(int other) const {
    SequencePlace place = *this;
    place.head = other;
    return place;
  }

  /// Blocks reach beyond the sequence: there, hooks that index tensors by a coordinate are told the
  /// nearest place inside. What they say of it is not used.
  template <class Variant>
  CUTLASS_DEVICE Place at(int query, int key) const {
    if constexpr (Variant::Hooks::kIndexesQueries) query = greater(0, lesser(query, last_query));
    if constexpr (Variant::Hooks::kIndexesKeys) key = lesser(key, last_key);
    return {{batch},
            {head},
            {query},
            {key},
            {sequence.row_q + query},
            {sequence.row_k + key},
            query + sequence.seqlen_k - sequence.seqlen_q,
            sequence.seqlen_q,
            sequence.seqlen_k};
  }
};

/// Where nobody asks.
struct NoPlaces {
  CUTLASS_DEVICE NoPlaces of_head(int) const { return {}; }
  template <class Variant>
  CUTLASS_DEVICE NoPlaces at(int, int) const {
    return {};
  }
};

}  // namespace cute_kernels::attention
