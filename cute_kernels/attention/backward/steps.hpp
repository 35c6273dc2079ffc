#pragma once

#include <cstdint>
#include <type_traits>

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/backward/key_blocks.hpp"
#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/sm90/uniform.hpp"

namespace cute_kernels::attention {

/// The steps of a key block in the one order that all warps of its CTA keep: the query heads of the
/// group, and for each the query blocks that see the keys, from the last to the first.
///
/// Where dQ is in order, key blocks add to a query block's dQ in the order of their numbers. So one
/// waits only for smaller numbers, which have started before it, and once it has waited for the one
/// before it, follows a step behind.
template <class Traits, class Params, Caller kCaller = Caller::kThread>
class QuerySteps {
  using KeyBlock = typename Traits::KeyBlock;

 public:
  CUTLASS_DEVICE QuerySteps(Params const& params, KeyBlock const& coord)
      : params_(params), coord_(coord) {
    // The CTAs of a cluster take the same steps.
    if constexpr (Traits::kAnyCall) {
      first_ = of_caller(coord.queries.begin);
      full_ = of_caller(coord.queries.full_begin);
      if constexpr (kIsWarp) {
        ends_.end = of_caller(coord.queries.end);
        ends_.full_end = of_caller(coord.queries.full_end);
      }
    } else {
      first_ = range_of(coord.n_block / Traits::kCluster * Traits::kCluster).begin;
      full_ = range_of(coord.n_block).full_begin;
    }
    block_ = end() - 1;
    head_in_group_ = Traits::kAnyCall && block_ < first_ ? params.heads_per_kv : 0;
  }

  CUTLASS_DEVICE bool valid() const { return head_in_group_ < params_.heads_per_kv; }

  CUTLASS_DEVICE void advance() {
    if (--block_ < first_) {
      block_ = end() - 1;
      ++head_in_group_;
    }
  }

  CUTLASS_DEVICE int head() const { return coord_.kv_head * params_.heads_per_kv + head_in_group_; }
  CUTLASS_DEVICE int block() const { return block_; }
  CUTLASS_DEVICE bool masked() const {
    if constexpr (Traits::kAnyCall) {
      if (block_ >= queries().full_end) return true;
    }
    if constexpr (Traits::Variant::kHasHooks) {
      // What hooks say of queries behind the last need not be finite.
      if ((block_ + 1) * Traits::kTileM > coord_.sequence.ranges.seqlen_q) return true;
    }
    return block_ < full_;
  }

  /// Counts over all query blocks of a call.
  CUTLASS_DEVICE int64_t block_index() const {
    return coord_.first_query_block(params_, head()) + block_;
  }

  /// How many add to the same slices of this step's dQ before, in order.
  CUTLASS_DEVICE int turn() const {
    int const cluster = coord_.n_block / Traits::kCluster;
    if constexpr (Traits::kAnyCall) {
      return turn_of(coord_.sequence.ranges, cluster, Traits::kTileN * Traits::kCluster, block_,
                     Traits::kTileM);
    } else {
      return cluster;
    }
  }

  /// Whose turn it is to add to the slices that are this CTA's of a cluster.
  CUTLASS_DEVICE int* turns() const {
    return params_.workspace.turns + block_index() * Traits::kCluster +
           Traits::rank(coord_.n_block);
  }

  /// This warpgroup's slice of the step's dQ, counted over all of a call.
  CUTLASS_DEVICE int64_t dq_slice(int warpgroup) const {
    return block_index() * Traits::kDqSlices + Traits::rank(coord_.n_block) * Traits::kConsumers +
           warpgroup;
  }

 private:
  static constexpr bool kIsWarp = kCaller == Caller::kWarp;

  CUTLASS_DEVICE static int of_caller(int value) {
    if constexpr (kIsWarp) {
      return sm90::uniform(value);
    } else {
      return value;
    }
  }

  /// Of any call: where the key block is, or for a warp, in its registers.
  CUTLASS_DEVICE auto const& queries() const {
    if constexpr (kIsWarp) {
      return ends_;
    } else {
      return coord_.queries;
    }
  }

  CUTLASS_DEVICE BlockRange range_of(int n_block) const {
    return params_.masks.query_blocks(n_block * Traits::kTileN, Traits::kTileN, Traits::kTileM);
  }

  /// Of the blocks that see the keys.
  CUTLASS_DEVICE int end() const {
    if constexpr (Traits::kAnyCall) {
      return queries().end;
    } else {
      return params_.workspace.m_blocks.divisor;
    }
  }

  Params const& params_;
  std::conditional_t<Traits::kAnyCall, KeyBlock const&, KeyBlock const> coord_;
  struct Ends {
    int end;
    int full_end;
  };
  struct None {};
  std::conditional_t<Traits::kAnyCall && kIsWarp, Ends, None> ends_;
  int first_;  // of the blocks that see the keys
  int full_;   // the first that needs no mask
  int block_;
  int head_in_group_;
};

}  // namespace cute_kernels::attention
