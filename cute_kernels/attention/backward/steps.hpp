#pragma once

#include <cstdint>
#include <type_traits>

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/backward/key_blocks.hpp"
#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/attention/variant/block_lists.hpp"
#include "cute_kernels/attention/variant/shared_mask.hpp"
#include "cute_kernels/sm90/uniform.hpp"

namespace cute_kernels::attention {

/// Where a step of a key block is: at a block of queries of a query head of the group.
template <class Traits, class Params>
class StepPlace {
  using KeyBlock = typename Traits::KeyBlock;

 public:
  CUTLASS_DEVICE bool valid() const { return head_in_group_ < params_.heads_per_kv; }

  CUTLASS_DEVICE int head() const { return coord_.kv_head * params_.heads_per_kv + head_in_group_; }
  CUTLASS_DEVICE int block() const { return block_; }

  /// Counts over all query blocks of a call.
  CUTLASS_DEVICE int64_t block_index() const {
    return coord_.first_query_block(params_, head()) + block_;
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

 protected:
  CUTLASS_DEVICE StepPlace(Params const& params, KeyBlock const& coord)
      : params_(params), coord_(coord) {}

  Params const& params_;
  std::conditional_t<Traits::kAnyCall, KeyBlock const&, KeyBlock const> coord_;
  int block_;
  int head_in_group_ = 0;
};

/// The steps of a key block in the one order that all warps of its CTA keep: the query heads of the
/// group, and for each the query blocks that see the keys, from the last to the first.
///
/// Where dQ is in order, key blocks add to a query block's dQ in the order of their numbers. So one
/// waits only for smaller numbers, which have started before it, and once it has waited for the one
/// before it, follows a step behind.
template <class Traits, class Params, Caller kCaller>
class RangeSteps : public StepPlace<Traits, Params> {
  using Place = StepPlace<Traits, Params>;
  using KeyBlock = typename Traits::KeyBlock;
  using Place::block_;
  using Place::coord_;
  using Place::head_in_group_;
  using Place::params_;

 public:
  CUTLASS_DEVICE RangeSteps(Params const& params, KeyBlock const& coord) : Place(params, coord) {
    // The CTAs of a cluster take the same steps.
    if constexpr (Traits::kAnyCall) {
      first_ = of_caller<kCaller>(coord.queries.begin);
      full_ = of_caller<kCaller>(coord.queries.full_begin);
      if constexpr (kIsWarp) {
        ends_.end = of_caller<kCaller>(coord.queries.end);
        ends_.full_end = of_caller<kCaller>(coord.queries.full_end);
      }
    } else {
      first_ = range_of(coord.n_block / Traits::kCluster * Traits::kCluster).begin;
      full_ = range_of(coord.n_block).full_begin;
    }
    block_ = end() - 1;
    head_in_group_ = Traits::kAnyCall && block_ < first_ ? params.heads_per_kv : 0;
  }

  CUTLASS_DEVICE void advance() {
    if (--block_ < first_) {
      block_ = end() - 1;
      ++head_in_group_;
    }
  }

  /// Whether the call's mask hides something.
  CUTLASS_DEVICE bool masked() const {
    if constexpr (Traits::kAnyCall) {
      if (block_ >= queries().full_end) return true;
    }
    return block_ < full_;
  }

  /// Whether a variant's mask hides nothing.
  CUTLASS_DEVICE static constexpr bool is_full() { return !Traits::Variant::kHides; }
  CUTLASS_DEVICE bool hides_some() const { return masked() || !is_full(); }

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

 private:
  static constexpr bool kIsWarp = kCaller == Caller::kWarp;

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

  struct Ends {
    int end;
    int full_end;
  };
  struct None {};
  std::conditional_t<Traits::kAnyCall && kIsWarp, Ends, None> ends_;
  int first_;  // of the blocks that see the keys
  int full_;   // the first that needs no mask
};

/// The same with a block mask: the query blocks of the units that it lists for the keys of a
/// cluster. A query block's turns count the units of keys that it is listed for, so that here, too,
/// one waits for smaller numbers, all of which come.
template <class Traits, class Params>
class ListPlace : public StepPlace<Traits, Params> {
  using Place = StepPlace<Traits, Params>;
  using KeyBlock = typename Traits::KeyBlock;
  static_assert(kMaskUnit % Traits::kTileM == 0, "a unit of a block mask is some whole blocks");
  static_assert(Traits::kTileN * Traits::kCluster == kMaskUnit, "a cluster has one unit's keys");

 public:
  CUTLASS_DEVICE bool masked() const { return found_.masked; }

  /// Whether a variant's mask hides nothing.
  CUTLASS_DEVICE bool is_full() const { return !Traits::Variant::kHides || found_.full; }
  CUTLASS_DEVICE bool hides_some() const { return masked() || !is_full(); }

 protected:
  using Place::coord_;
  using Place::params_;
  static constexpr int kBlocksOfUnit = kMaskUnit / Traits::kTileM;

  struct Found {
    bool masked;
    bool full;
  };

  CUTLASS_DEVICE ListPlace(Params const& params, KeyBlock const& coord) : Place(params, coord) {}

  CUTLASS_DEVICE BlockRow row_of(int head_in_group) const {
    return BlockRow(params_.variant.blocks, coord_.sequence.batch,
                    coord_.kv_head * params_.heads_per_kv + head_in_group,
                    coord_.n_block / Traits::kCluster);
  }

  /// How many query blocks are listed. The last units may reach beyond the last query.
  CUTLASS_DEVICE int blocks_of(BlockRow const& row) const {
    int const units = row.count();
    if (units == 0) return 0;
    int const end = (row.entry(units - 1).unit() + 1) * kBlocksOfUnit;
    return units * kBlocksOfUnit - greater(0, end - params_.workspace.m_blocks.divisor);
  }

  CUTLASS_DEVICE static int block_at(BlockEntry entry, int place) {
    return entry.unit() * kBlocksOfUnit + place % kBlocksOfUnit;
  }

  CUTLASS_DEVICE Found found(BlockEntry entry, int block) const {
    return {block >= coord_.queries.full_end || block < coord_.queries.full_begin, entry.is_full()};
  }

  Found found_;
};

/// One after the other.
template <class Traits, class Params>
class ListedSteps : public ListPlace<Traits, Params> {
  using Place = ListPlace<Traits, Params>;
  using Place::head_in_group_;

 public:
  CUTLASS_DEVICE ListedSteps(Params const& params, typename Traits::KeyBlock const& coord)
      : Place(params, coord) {
    begin_head();
  }

  CUTLASS_DEVICE void advance() {
    if (--place_ >= 0) {
      read();
    } else {
      ++head_in_group_;
      begin_head();
    }
  }

  CUTLASS_DEVICE int turn() const {
    return this->row_of(head_in_group_).turn(place_ / Place::kBlocksOfUnit);
  }

 private:
  /// The last place of the first head, from head_in_group_ on, that has one.
  CUTLASS_DEVICE void begin_head() {
    for (; this->valid(); ++head_in_group_) {
      place_ = this->blocks_of(this->row_of(head_in_group_)) - 1;
      if (place_ >= 0) return read();
    }
  }

  CUTLASS_DEVICE void read() {
    BlockEntry const entry = this->row_of(head_in_group_).entry(place_ / Place::kBlocksOfUnit);
    this->block_ = Place::block_at(entry, place_);
    this->found_ = this->found(entry, this->block_);
  }

  int place_;
};

/// Of a warp, whose lanes look up as many steps at a time: nothing that a loop over the steps reads
/// decides when it ends, which would keep the compiler from seeing that the lanes stay together.
template <class Traits, class Params>
class ListedStepsOfWarp : public ListPlace<Traits, Params> {
  using Place = ListPlace<Traits, Params>;
  using Bits = SharedMask<Traits::kTileM>;
  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kPlaces = 2 * Bits::kSlots;  // more than slots, a power of 2

 public:
  CUTLASS_DEVICE ListedStepsOfWarp(Params const& params, typename Traits::KeyBlock const& coord)
      : Place(params, coord) {
    int steps = 0;
    for (int head = 0; head < params.heads_per_kv; ++head) {
      steps += this->blocks_of(this->row_of(head));
    }
    left_ = sm90::uniform(steps);
    look_up();
    read();
  }

  CUTLASS_DEVICE bool valid() const { return left_ > 0; }

  /// The words of the step's block that a thread has of SharedMask, or null.
  CUTLASS_DEVICE uint32_t const* shared_words(int thread) const {
    uint32_t const* const words = this->params_.variant.shared_mask;
    if (words == nullptr || slot_ < 0) return nullptr;
    return words +
           Bits::place(this->row_of(0).number(), slot_, this->block_ % Bits::kBlocksOfUnit, thread);
  }

  /// The same from its first step on. What ends a loop has to be uniform to the compiler right
  /// before it: behind waits for barriers it no longer is.
  CUTLASS_DEVICE ListedStepsOfWarp begin() const {
    ListedStepsOfWarp steps = *this;
    steps.left_ = sm90::uniform(left_);
    return steps;
  }

  CUTLASS_DEVICE void advance() {
    --left_;
    ++number_;
    if (number_ % kLanes == 0) look_up();
    read();
  }

 private:
  /// The lane's step of those from number_ on.
  CUTLASS_DEVICE void look_up() {
    int before = number_ + static_cast<int>(threadIdx.x) % kLanes;
    for (int head = 0; head < this->params_.heads_per_kv; ++head) {
      BlockRow const row = this->row_of(head);
      int const place = this->blocks_of(row) - 1 - before;
      if (before >= 0 && place >= 0) {
        BlockEntry const entry = row.entry(place / Place::kBlocksOfUnit);
        int const block = Place::block_at(entry, place);
        auto const found = this->found(entry, block);
        own_head_ = head * kPlaces + Bits::slot_of(place / Place::kBlocksOfUnit, row.count()) + 1;
        own_block_ = 4 * block + 2 * found.masked + found.full;
      }
      before = -place - 1;
    }
  }

  CUTLASS_DEVICE void read() {
    int const packed = __shfl_sync(0xffffffff, own_block_, number_ % kLanes);
    int const head_and_slot = __shfl_sync(0xffffffff, own_head_, number_ % kLanes);
    this->head_in_group_ = head_and_slot / kPlaces;
    slot_ = head_and_slot % kPlaces - 1;
    this->block_ = packed / 4;
    this->found_ = {(packed & 2) != 0, (packed & 1) != 0};
  }

  int left_;
  int number_ = 0;
  int slot_;           // of SharedMask, or -1
  int own_head_ = 0;   // times kPlaces, + 1 + the slot
  int own_block_ = 0;  // times 4, + 2 if masked, + 1 if full
};

template <class Traits, class Params, Caller kCaller = Caller::kThread>
using QuerySteps = std::conditional_t<
    !Traits::Variant::kHasBlockMask, RangeSteps<Traits, Params, kCaller>,
    std::conditional_t<kCaller == Caller::kWarp, ListedStepsOfWarp<Traits, Params>,
                       ListedSteps<Traits, Params>>>;

/// The steps of a key block from its first on, for who has to know first whether there is one.
/// Listed ones are looked up here, as early as this is made: that takes a few latencies of memory.
template <class Traits, class Params, Caller kCaller>
class KeyBlockSteps {
  using Steps = QuerySteps<Traits, Params, kCaller>;
  using KeyBlock = typename Traits::KeyBlock;
  static constexpr bool kIsListed = Traits::Variant::kHasBlockMask;

  struct Later {
    Params const& params;
    KeyBlock const& coord;
  };

 public:
  CUTLASS_DEVICE KeyBlockSteps(Params const& params, KeyBlock const& coord)
      : steps_{params, coord} {}

  CUTLASS_DEVICE bool any() const { return first().valid(); }
  CUTLASS_DEVICE Steps first() const {
    if constexpr (kIsListed && kCaller == Caller::kWarp) {
      return steps_.begin();
    } else if constexpr (kIsListed) {
      return steps_;
    } else {
      return Steps(steps_.params, steps_.coord);
    }
  }

 private:
  std::conditional_t<kIsListed, Steps, Later> steps_;
};

}  // namespace cute_kernels::attention
