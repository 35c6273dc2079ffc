#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/attention/decode/softmax.hpp"
#include "cute_kernels/attention/latent/source.hpp"
#include "cute_kernels/attention/latent/traits.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// A consumer warpgroup: half of the columns of softmax(scale (Q K^T + Qv V^T)) V of a part's rows,
/// not divided by the row sums.
///
/// The scores of a block are those of the warpgroup whose stage it is in, which makes P of them.
/// Both warpgroups add P V of all blocks, in order, each to its half of O; P goes from the one to
/// the other through shared memory, with the maxima that it is relative to. So a warpgroup's
/// products of values run under the other one's softmax, and its scores under the other's values.
template <class Traits>
class LatentMainloop {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;
  using Seen = SeenKeys<Traits>;

  static constexpr int kLeft = Traits::kLeft;
  static constexpr int kTileN = Traits::kTileN;
  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
  static constexpr int kRows = Seen::kRows;

 public:
  using Softmax = RunningSoftmax<kRows>;

  CUTLASS_DEVICE LatentMainloop(ScoreUnits const& units, LatentSource const& source,
                                CachedCall const& call, SharedStorage& shared)
      : units_(units),
        source_(source),
        call_(call),
        shared_(shared),
        warpgroup_(cutlass::canonical_warp_group_idx() - 1) {}

  /// A warpgroup's half of O, of a part without keys.
  CUTLASS_DEVICE static auto empty_output() {
    using namespace cute;
    auto out = partition_fragment_C(typename Traits::MmaOwnPv{},
                                    Shape<Int<Traits::kWarpgroupM>, Int<kLeft>>{});
    clear(out);
    return out;
  }

  /// Of this warpgroup's half of O.
  CUTLASS_DEVICE static AccumulatorPlace place() {
    return {first_accumulator_row(),
            (int(threadIdx.x) / kThreads - 1) * kLeft + first_accumulator_column()};
  }

  template <class Output>
  CUTLASS_DEVICE void compute(Walk const& walk, Softmax& softmax, Output& out) {
    using namespace cute;
    if (walk.begin_block() == walk.end_block()) return;
    // From here on blocks are numbered as the CTA comes to them.
    uint32_t const end = added_ + walk.end_block() - walk.begin_block();
    int const first_block = walk.begin_block() - static_cast<int>(added_);
    int const thread = threadIdx.x % kThreads;
    typename Traits::MmaQk mma_qk;
    typename Traits::MmaOwnPv mma_own_pv;
    typename Traits::MmaOtherPv mma_other_pv;
    auto slice_qk = mma_qk.get_thread_slice(thread);
    auto slice_own_pv = mma_own_pv.get_thread_slice(thread);
    auto slice_other_pv = mma_other_pv.get_thread_slice(thread);
    auto operand_q = [&](auto& rows) {
      return slice_qk.make_fragment_A(slice_qk.partition_A(as_tensor(rows)));
    };
    auto operand_k = [&](auto& rows) {
      return slice_qk.make_fragment_B(slice_qk.partition_B(as_tensor(rows)));
    };
    auto operand_v = [&](auto& slice_pv) {
      auto const values = make_tensor(make_smem_ptr(own_values()), typename Traits::LayoutVt{});
      return slice_pv.make_fragment_B(slice_pv.partition_B(values));
    };
    auto operand_p =
        slice_other_pv.make_fragment_A(slice_other_pv.partition_A(as_tensor(shared_.p)));
    auto scores = partition_fragment_C(mma_qk, Shape<Int<Traits::kWarpgroupM>, Int<kTileN>>{});
    auto probabilities = make_tensor<Element>(sm90::accumulator_as_operand_a(scores.layout()));
    auto score_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
    auto out_rows = make_tensor(out.data(), sm90::accumulator_rows_cols(out.layout()));
    Seen const seen(call_, source_.cache.group, walk, first_accumulator_row());
    float factor[kRows];

    // S of an own block, in flight: of its left part while the right one may be on its way.
    auto issue_scores = [&](uint32_t number) {
      shared_.left_full[warpgroup_].wait(phase_of(number));
      cutlass::arch::fence_view_async_shared();
      sm90::issue_gemm<sm90::Accumulate::kNo>(mma_qk, operand_q(shared_.q_left),
                                              operand_k(shared_.left[warpgroup_]), scores);
      shared_.right_full[warpgroup_].wait(phase_of(number));
      cutlass::arch::fence_view_async_shared();
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_qk, operand_q(shared_.q_right),
                                               operand_k(shared_.right[warpgroup_]), scores);
    };
    // O becomes relative to the maxima that a block's P is relative to. V has landed: S was made
    // of it, and nobody needs it as a key any more.
    auto prepare_values = [&](bool moves) {
      if (moves) Softmax::scale_rows(out_rows, factor);
      int const block = first_block + static_cast<int>(added_);
      if (seen.template clear_values<kLeft>(block, own_values(), warpgroup_)) {
        shared_.cleared[warpgroup_] = added_ + 1;
      }
      cutlass::arch::fence_view_async_shared();
    };
    // P of an own block, from its scores, for both warpgroups; whether O is to be multiplied.
    auto softmax_block = [&](uint32_t number) {
      if (number + Traits::kStages >= end) release(shared_.q_empty);
      if (units_.softcap > 0) cap_scores(units_, scores);
      seen.mask(score_rows, first_block + static_cast<int>(number));
      return softmax.update(score_rows, factor);
    };
    auto tell_probabilities = [&] {
      auto p = make_tensor(scores.data(), sm90::accumulator_as_operand_a(scores.layout()));
      sm90::convert_fragment<Element>(p, probabilities);
      write_probabilities(make_tensor(probabilities.data(), score_rows.layout()), softmax, factor);
    };
    // O += P V of the next block, in flight.
    auto issue_own_values = [&](bool moves) {
      prepare_values(moves);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_own_pv, probabilities, operand_v(slice_own_pv),
                                               out);
    };
    auto issue_other_values = [&] {
      bool const moves = read_maxima(softmax, factor);
      prepare_values(moves);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_other_pv, operand_p, operand_v(slice_other_pv),
                                               out);
    };
    auto release_values = [&] {
      warpgroup_fence_operand(out);
      uint32_t const stage = added_++ % Traits::kStages;
      release(warpgroup_ == 0 ? shared_.left_empty[stage] : shared_.right_empty[stage]);
    };

    shared_.q_full.wait(q_phase_);
    q_phase_ ^= 1;
    if (added_ % Traits::kStages == warpgroup_) {
      // Prologue: an own block that is the part's first, nothing to overlap with.
      issue_scores(added_);
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      bool const moves = softmax_block(added_);
      tell_probabilities();
      issue_own_values(moves);
      warpgroup_wait<0>();
      release_values();
    } else if (added_ + 1 == end) {
      release(shared_.q_empty);
    }

    // Steady state: a block of the other warpgroup's, and an own one. The softmax of the own one
    // runs while P V of the other one is in flight.
    CUTLASS_PRAGMA_NO_UNROLL
    while (added_ + 1 < end) {
      issue_scores(added_ + 1);
      issue_other_values();
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      bool const moves = softmax_block(added_ + 1);
      sm90::warpgroup_wait_all();
      release_values();
      tell_probabilities();
      issue_own_values(moves);
      sm90::warpgroup_wait_all();
      release_values();
    }

    // Tail: the last one is the other warpgroup's.
    if (added_ < end) {
      issue_other_values();
      warpgroup_wait<0>();
      release_values();
    }
    bool const has_cleared = shared_.cleared[warpgroup_] > walk.begin_block() - first_block;
    if (has_cleared) add_cleared(walk, seen, out_rows);
    add_up_sums(softmax);
  }

 private:
  /// The phase of a stage's barriers, and of its warpgroup's P, for block number `number`.
  CUTLASS_DEVICE static uint32_t phase_of(uint32_t number) { return number / Traits::kStages & 1; }

  template <int kColumns>
  CUTLASS_DEVICE static auto as_tensor(typename Traits::template Rows<kColumns>& rows) {
    return cute::make_tensor(cute::make_smem_ptr(rows.data()),
                             typename Traits::template LayoutRows<kColumns>{});
  }

  /// This warpgroup's half of V's columns, of the block whose values are added next.
  CUTLASS_DEVICE Element* own_values() const {
    uint32_t const stage = added_ % Traits::kStages;
    return warpgroup_ == 0 ? shared_.left[stage].data() : shared_.right[stage].data();
  }

  /// Tells the other warpgroup P of an own block, and the maxima that it is relative to. What it is
  /// written over this warpgroup has read: P of the block before, which was the other one's.
  template <class Probabilities>
  CUTLASS_DEVICE void write_probabilities(Probabilities const& p, Softmax const& softmax,
                                          float const (&factor)[kRows]) const {
    using namespace cute;
    auto const shared_p = as_position_independent_swizzle_tensor(as_tensor(shared_.p));
    int const first_key = first_accumulator_column();
    sm90::barrier_sync(sm90::NamedBarrier::kProbabilitiesRead, warpgroup_, kThreads);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      int const row = first_accumulator_row() + 8 * i;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(p); col += 2) {
        auto const pair = reinterpret_cast<uint32_t const&>(p(i, col));
        reinterpret_cast<uint32_t&>(shared_p(row, first_key + accumulator_column(col))) = pair;
      }
      if (first_key == 0) {
        shared_.most[row] = softmax.most(i);
        shared_.factor[row] = factor[i];
      }
    }
    keep_memory_order();
    cutlass::arch::fence_view_async_shared();
    shared_.p_full[warpgroup_].arrive();
  }

  /// Waits for the other warpgroup's P, and reads what comes with it; whether O is to be multiplied
  /// by it, in the warp.
  CUTLASS_DEVICE bool read_maxima(Softmax& softmax, float (&factor)[kRows]) const {
    shared_.p_full[1 - warpgroup_].wait(phase_of(added_));
    keep_memory_order();
    bool moves = false;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      int const row = first_accumulator_row() + 8 * i;
      factor[i] = shared_.factor[row];
      softmax.follow(i, shared_.most[row], factor[i]);
      moves |= factor[i] != 1.f;
    }
    return __any_sync(0xffffffff, moves);
  }

  /// Adds what of V is not finite to the rows that see it: it has been cleared in blocks that other
  /// rows do not see in full. Read again: it is rare.
  template <class Output>
  CUTLASS_DEVICE void add_cleared(Walk const& walk, Seen const& seen, Output& out) const {
    CacheView const& v = source_.cache.v;
    auto const* const values = static_cast<Element const*>(v.data) +
                               walk.head() / source_.heads_of_key * v.head_stride + place().column;
    int const columns = call_.head_dim_v - place().column;
    KeySpan const keys = walk.tile().keys;
    int const end = min(keys.begin + walk.end_block() * kTileN, keys.end);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int key = keys.begin + walk.begin_block() * kTileN; key < end; ++key) {
      if (seen.are_alike((key - keys.begin) / kTileN)) continue;
      FoundRow const row =
          row_of_key(source_.cache, walk.entry(), key).among(source_.cache.pages.pages);
      if (row.major < 0) continue;
      auto const* const of_key = values + row.major * v.page_stride + row.minor * v.slot_stride;
      bool const sees[kRows] = {seen.is_seen(0, key), seen.is_seen(1, key)};
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < cute::size<1>(out); ++col) {
        int const column = accumulator_column(col);
        if (column >= columns || sm90::is_finite(of_key[column])) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRows; ++i) {
          if (sees[i]) out(i, col) += static_cast<float>(of_key[column]);
        }
      }
    }
  }

  /// Each warpgroup has the row sums of its own blocks: both get those of all.
  CUTLASS_DEVICE void add_up_sums(Softmax& softmax) const {
    constexpr int kAllThreads = Traits::kConsumers * kThreads;
    softmax.reduce_sums();
    // What was written for the part before has been read.
    sm90::barrier_sync(sm90::NamedBarrier::kSumsWritten, 0, kAllThreads);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (first_accumulator_column() == 0)
        shared_.sums[warpgroup_][first_accumulator_row() + 8 * i] = softmax.sum(i);
    }
    sm90::barrier_sync(sm90::NamedBarrier::kSumsWritten, 0, kAllThreads);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      softmax.add_sum(i, shared_.sums[1 - warpgroup_][first_accumulator_row() + 8 * i]);
    }
  }

  /// The compiler moves no read or write of memory across, as it may across CUTLASS's barriers.
  CUTLASS_DEVICE static void keep_memory_order() { asm volatile("" ::: "memory"); }

  /// One arrival a warp.
  CUTLASS_DEVICE static void release(cutlass::arch::ClusterBarrier const& barrier) {
    if (cute::elect_one_sync()) barrier.arrive();
  }

  ScoreUnits const& units_;
  LatentSource const& source_;
  CachedCall const& call_;
  SharedStorage& shared_;
  int const warpgroup_;
  uint32_t added_ = 0;  // blocks whose values have been added: number i is in stage i % kStages
  uint32_t q_phase_ = 0;
};

}  // namespace cute_kernels::attention
