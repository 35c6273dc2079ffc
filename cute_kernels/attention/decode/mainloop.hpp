#pragma once

#include <cutlass/fast_math.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/cache_rows.hpp"
#include "cute_kernels/attention/decode/fp8_scales.hpp"
#include "cute_kernels/attention/decode/part_rows.hpp"
#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/attention/decode/softmax.hpp"
#include "cute_kernels/attention/decode/traits.hpp"
#include "cute_kernels/attention/decode/turns.hpp"
#include "cute_kernels/sm90/finite.hpp"
#include "cute_kernels/sm90/mbarrier.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/opaque.hpp"
#include "cute_kernels/sm90/uniform.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// A consumer warpgroup: softmax(scale Q K^T) V of 64 rows of a part, not divided by the row sums.
/// Where warpgroups take turns with the blocks, each goes round the ring of stages by as many at a
/// time. That no phase of a full barrier is taken for the one before holds as copies land in order:
/// when a block's turn comes, its warpgroup knows of a later one than was in its stage before.
template <class Traits>
class DecodeMainloop {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Stage = RingStage<Traits::kStages>;
  using Walk = WorkWalk<Traits>;
  using Part = WarpgroupPart<Traits>;
  using Scales = std::conditional_t<Traits::kEightBits, Fp8Scales<Traits>, NoScales>;

  static constexpr int kTileN = Traits::kTileN;
  static constexpr int kWarpgroupM = Traits::kWarpgroupM;
  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
  static constexpr int kRows = 2;  // of a thread, 8 apart
  // Whether what a row's scores are multiples of may be in the softmax's scale: two registers more.
  static constexpr bool kOfUnits = Traits::kEightBits && Traits::kHeadDim < 256;
  // Whether a warpgroup's next V, whose factors P is multiplied by, may land while it reads one.
  static constexpr bool kKnowsNext = Traits::kStages > (Traits::kConsumers == 2 ? 2 : 1);

 public:
  using Softmax = RunningSoftmax<kRows, 2, kOfUnits>;

  CUTLASS_DEVICE DecodeMainloop(CachedCall const& call, CacheSource const& source,
                                ScoreUnits const& units, typename Traits::Format const& format,
                                SharedStorage& shared)
      : units_(units),
        group_(source.group),
        call_(call),
        scales_(call, source, format),
        shared_(shared) {}

  /// O of a part without keys.
  CUTLASS_DEVICE static auto empty_output() {
    using namespace cute;
    auto out = partition_fragment_C(typename Traits::MmaPv{},
                                    Shape<Int<kWarpgroupM>, Int<Traits::kHeadDim>>{});
    clear(out);
    return out;
  }

  template <class Output>
  CUTLASS_DEVICE void compute(Walk const& walk, Softmax& softmax, Output& out) {
    if (walk.begin_block() == walk.end_block()) return;
    if constexpr (!Traits::kEightBits) {
      shared_.q_full.wait(q_phase_);
      q_phase_ ^= 1;
    }
    Part part(walk, warpgroup());
    part.begin = sm90::uniform(part.begin);
    if constexpr (Traits::kHeads == 1 && Traits::kConsumers < 3) {
      part.turns = sm90::uniform(part.turns);
    }
    if (part.begin < walk.end_block()) {
      compute_rows(walk, part, softmax, out);
    } else {
      release(shared_.q_empty);
    }
    passed_ += walk.end_block() - walk.begin_block();
  }

  /// Hands over what compute() has made of a part: results(rows, place) of columns of O of which
  /// this warpgroup has all blocks, and of their place in the tile.
  template <class Output, class Results>
  CUTLASS_DEVICE void finish(Walk const& walk, Softmax& softmax, Output& out,
                             Results const& results) const {
    Part const part(walk, warpgroup());
    AccumulatorPlace place{part.first_row + first_accumulator_row(), first_accumulator_column()};
    if constexpr (Traits::kHeads > 1) {
      place.row += warpgroup() * PartRows<Traits>::kOfHead;
    } else if constexpr (Traits::kConsumers == 2) {
      if (part.takes_turns() && has_turns(walk)) {
        auto half = TurnsEnd<Traits>(walk, warpgroup(), passed_, shared_).join(softmax, out);
        place.column += warpgroup() * Traits::kHeadDim / 2;
        results(sm90::rows_cols(half), place);
        return;
      }
      if constexpr (Traits::kEightBits) {
        // Behind a part of one block, which is one warpgroup's, the other one knows of no copy that
        // has landed since, as of 8 bits it waits for no queries: it would fall behind the ring of
        // stages by more than the one bit of a barrier's phase tells.
        if (part.takes_turns() && walk.end_block() > walk.begin_block()) {
          sm90::barrier_sync(sm90::NamedBarrier::kTurnsEnded, 0, 2 * kThreads);
        }
      }
      if (part.takes_turns() && warpgroup() > 0) return;
    }
    results(sm90::rows_cols(out), place);
  }

 private:
  CUTLASS_DEVICE static int warpgroup() {
    return cutlass::canonical_warp_group_idx() - Traits::kProducers;
  }
  /// Whether a second warpgroup, too, has blocks of a part where they take turns.
  CUTLASS_DEVICE static bool has_turns(Walk const& walk) {
    return walk.end_block() - walk.begin_block() > 1;
  }
  template <class Output>
  CUTLASS_DEVICE void compute_rows(Walk const& walk, Part const& part, Softmax& softmax,
                                   Output& out) {
    using namespace cute;
    int const thread = threadIdx.x % kThreads;
    typename Traits::MmaQk mma_qk;
    typename Traits::MmaPv mma_pv;
    auto slice_qk = mma_qk.get_thread_slice(thread);
    auto slice_pv = mma_pv.get_thread_slice(thread);
    // Of 8 bits, and where it has a head, each warpgroup has queries of its own.
    int const buffer = sm90::uniform(
        Traits::kEightBits || Traits::kHeads > 1 ? warpgroup() : part.first_row / kWarpgroupM);
    auto shared_q =
        make_tensor(make_smem_ptr(shared_.q[buffer].data()), typename Traits::LayoutQ{});
    auto operand_q = slice_qk.make_fragment_A(slice_qk.partition_A(shared_q));
    // A warpgroup's planes, the first of which is that of its head.
    auto planes = [&](auto& stages, auto const& layout) {
      int const first = Traits::kHeads > 1 ? buffer * Traits::kPlaneElements : 0;
      return make_tensor(make_smem_ptr(stages.data() + first), layout);
    };
    auto operand_k = slice_qk.make_fragment_B(
        slice_qk.partition_B(planes(shared_.k, typename Traits::LayoutK{})));
    auto operand_v = slice_pv.make_fragment_B(
        slice_pv.partition_B(planes(shared_.v, typename Traits::LayoutVt{})));
    auto scores = partition_fragment_C(mma_qk, Shape<Int<kWarpgroupM>, Int<kTileN>>{});
    auto probabilities = make_tensor<Element>(sm90::accumulator_as_operand_a(scores.layout()));
    auto score_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
    auto out_rows = sm90::rows_cols(out);

    SeenKeys<Traits> const seen(call_, group_, walk, part.first_row + first_accumulator_row());
    if constexpr (Traits::kEightBits) {
      scales_.load_queries(walk, warpgroup(), part.first_row, shared_);
      scales_.begin(walk, warpgroup(), part.first_row, first_accumulator_row(), shared_);
      if constexpr (kOfUnits) scales_.begin_units(units_, softmax);
    }
    Stage k_stage = Stage::of(sm90::uniform(passed_ + (part.begin - walk.begin_block())));
    Stage v_stage = k_stage;
    int const last = sm90::uniform(walk.end_block()) - part.turns;  // at the earliest

    auto keys = [&] { return operand_k(_, _, _, k_stage.index * Traits::kHeads); };
    auto values = [&] { return operand_v(_, _, _, v_stage.index * Traits::kHeads); };
    auto wait_for_keys = [&] { shared_.k_full[k_stage.index].wait(k_stage.phase); };
    // NaN that some rows do not see is cleared then.
    auto wait_for_values = [&](int block) {
      shared_.v_full[v_stage.index].wait(v_stage.phase);
      if (!seen.are_alike(block)) guard_values(seen, part, out_rows, block, v_stage.index);
    };
    // S has been computed.
    auto release_keys = [&](int block) {
      if constexpr (Traits::kEightBits) {
        scales_.apply_to_scores(score_rows, first_accumulator_column(), k_stage.index, shared_);
      }
      release(shared_.k_empty[k_stage.index], part.turns);
      k_stage.advance(part.turns);
      if (block >= last) release(shared_.q_empty);
    };
    auto softmax_block = [&](int block, float (&factor)[kRows]) {
      if (units_.softcap > 0) cap_scores(units_, scores);
      seen.mask_by_bits(score_rows, block);
      return softmax.update(score_rows, factor);
    };
    // What O is multiplied by before the next P V; whether it is more than the softmax says.
    auto scale_probabilities = [&](Stage const& stage, float (&factor)[kRows]) {
      if constexpr (Traits::kEightBits) {
        if (scales_.are_values_scaled()) {
          shared_.v_full[stage.index].wait(stage.phase);
          return scales_.apply_to_probabilities(score_rows, first_accumulator_column(), stage.index,
                                                shared_, factor);
        }
      }
      return false;
    };
    auto round_probabilities = [&] {
      auto p = make_tensor(scores.data(), sm90::accumulator_as_operand_a(scores.layout()));
      sm90::convert_fragment<Element>(p, probabilities);
    };
    auto release_values = [&] {
      release(shared_.v_empty[v_stage.index], part.turns);
      v_stage.advance(part.turns);
    };

    // Prologue: the first block's P, nothing to overlap with yet.
    int block = part.begin;
    float factor[kRows];
    wait_for_keys();
    cutlass::arch::fence_view_async_shared();
    sm90::issue_gemm<sm90::Accumulate::kNo>(mma_qk, sm90::described_here(operand_q), keys(),
                                            scores);
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    release_keys(block);
    softmax_block(block, factor);
    scale_probabilities(v_stage, factor);
    round_probabilities();

    // Steady state: the softmax of a block runs while P V of the one before is in flight. Values
    // have landed before the keys that come behind them: a fence for both costs no time.
    CUTLASS_PRAGMA_NO_UNROLL
    for (; block < last; block += part.turns) {
      wait_for_values(block);
      wait_for_keys();
      cutlass::arch::fence_view_async_shared();
      sm90::issue_gemms(mma_qk, sm90::described_here(operand_q), keys(), scores, mma_pv,
                        probabilities, values(), out);
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      release_keys(block + part.turns);
      bool moves = softmax_block(block + part.turns, factor);
      if constexpr (kKnowsNext) {
        Stage next = v_stage;
        next.advance(part.turns);
        moves |= scale_probabilities(next, factor);
      }
      // A branch, which keeps the exponentials on this side of the wait.
      if (moves) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(out);
        Softmax::scale_rows(out_rows, factor);
      }
      sm90::warpgroup_wait_all();
      warpgroup_fence_operand(out);
      release_values();
      if constexpr (!kKnowsNext) {
        float growth[kRows] = {1.f, 1.f};
        if (scale_probabilities(v_stage, growth)) Softmax::scale_rows(out_rows, growth);
      }
      round_probabilities();
    }

    // Tail: the last block's P V. Where there have been turns its stage is needed once more.
    wait_for_values(block);
    cutlass::arch::fence_view_async_shared();
    sm90::issue_gemm<sm90::Accumulate::kYes>(mma_pv, probabilities, values(), out);
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    if (!part.takes_turns() || !has_turns(walk)) release_values();
    if constexpr (Traits::kEightBits) {
      scales_.apply_to_output(out, walk);
      if constexpr (kOfUnits) scales_.end_units(units_, softmax);
    }
    softmax.reduce_sums();
  }

  /// The arrivals of a warp, and of those of other warpgroups that do not come here.
  CUTLASS_DEVICE static void release(cutlass::arch::ClusterBarrier const& barrier, int count = 1) {
    if (cute::elect_one_sync()) sm90::arrive(barrier, count);
  }

  /// Keeps NaN and infinities of V out of rows that do not see them: where P is 0, P V would still
  /// be NaN. They are cleared, and added to the rows that do see them. Of a block that some rows
  /// see in part, when V has landed.
  template <class Output>
  CUTLASS_DEVICE void guard_values(SeenKeys<Traits> const& seen, Part const& part, Output& out,
                                   int block, int stage) {
    using namespace cute;
    int const plane = Traits::kHeads > 1 ? stage * Traits::kHeads + warpgroup() : stage;
    Element* const data = shared_.v.data() + plane * Traits::kPlaneElements;
    // Not kept from block to block.
    uint32_t const of_cta = sm90::opaque(threadIdx.x);
    int const thread = of_cta % kThreads;
    // Each of the warpgroups that read the block looks at all of it.
    bool const is_alone = Traits::kHeads > 1 || part.takes_turns();
    int const all_threads = (is_alone ? 1 : Traits::kConsumers) * kThreads;
    int const first_reader = is_alone ? warpgroup() : 0;
    auto const cleared =
        is_alone ? sm90::NamedBarrier::kValuesCleared : sm90::NamedBarrier::kSharedValuesCleared;
    bool const own = sm90::all_finite<kThreads, Traits::kPlaneElements>(data, thread);
    if (sm90::barrier_all(cleared, first_reader, all_threads, own)) return;
    auto const values = make_tensor(make_smem_ptr(data), typename Traits::LayoutRows{});
    constexpr int kBits = 32;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int first = 0; first < kTileN; first += kBits) {
      uint32_t sees[kRows];  // of keys from `first` on
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        sees[row] = 0;
        CUTLASS_PRAGMA_NO_UNROLL
        for (int i = 0; i < kBits; ++i) {
          bool const own = seen.is_seen(row, seen.first_key(block) + first + i);
          sees[row] |= static_cast<uint32_t>(own) << i;
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(out); ++col) {
        // Worked out for each column anew: what would be kept of all of them takes registers from
        // blocks that are not guarded.
        int const column = first_accumulator_column(sm90::opaque(thread)) + accumulator_column(col);
        CUTLASS_PRAGMA_NO_UNROLL
        for (int i = 0; i < kBits; ++i) {
          Element const value = values(first + i, column);
          if (sm90::is_finite(value)) continue;
          CUTLASS_PRAGMA_UNROLL
          for (int row = 0; row < kRows; ++row) {
            if ((sees[row] >> i & 1) != 0) out(row, col) += static_cast<float>(value);
          }
        }
      }
    }
    sm90::barrier_sync(cleared, first_reader, all_threads);
    if (warpgroup() == first_reader) {
      sm90::clear_nonfinite<kThreads, Traits::kPlaneElements>(data, thread);
    }
    cutlass::arch::fence_view_async_shared();
    sm90::barrier_sync(cleared, first_reader, all_threads);
  }

  ScoreUnits units_;
  cutlass::FastDivmod const& group_;
  CachedCall const& call_;
  Scales scales_;
  SharedStorage& shared_;
  uint32_t passed_ = 0;  // blocks of the parts so far
  uint32_t q_phase_ = 0;
};

}  // namespace cute_kernels::attention
