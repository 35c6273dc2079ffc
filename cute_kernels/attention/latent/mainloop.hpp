#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/attention/decode/softmax.hpp"
#include "cute_kernels/attention/latent/source.hpp"
#include "cute_kernels/attention/latent/traits.hpp"
#include "cute_kernels/sm90/mbarrier.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/uniform.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// A consumer warpgroup: half of the columns of softmax(scale (Q K^T + Qv V^T)) V of a part's rows,
/// not divided by the row sums.
///
/// The scores of a block are those of the warpgroup whose stage it is in, which makes P of them.
/// Both warpgroups add P V of all blocks, in order, each to its half of O; P goes from the one to
/// the other through shared memory, with the maxima that it is relative to.
///
/// The tensor cores have in turn: S of a block of warpgroup 0; under its softmax S of the block
/// behind it, warpgroup 1's; under that one's softmax P V of the first block, in both warpgroups;
/// P V of the second one, while the next keys land in the first one's stage.
template <class Traits>
class LatentMainloop {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;
  using Seen = SeenKeys<Traits>;

  static constexpr int kHalf = Traits::kHalf;
  static constexpr int kTileN = Traits::kTileN;
  static constexpr int kMmaK = 16;  // columns of a WGMMA of scores
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
                                    Shape<Int<Traits::kWarpgroupM>, Int<kHalf>>{});
    clear(out);
    return out;
  }

  /// Of this warpgroup's half of O.
  CUTLASS_DEVICE static AccumulatorPlace place() {
    return {first_accumulator_row(),
            (int(threadIdx.x) / kThreads - 1) * kHalf + first_accumulator_column()};
  }

  template <class Output>
  CUTLASS_DEVICE void compute(Walk const& walk, Softmax& softmax, Output& out) {
    int const begin = sm90::uniform(walk.begin_block());
    int const end = sm90::uniform(walk.end_block());
    if (begin == end) return;
    warpgroup_ == 0 ? compute_as<0>(walk, begin, end, softmax, out)
                    : compute_as<1>(walk, begin, end, softmax, out);
  }

 private:
  /// The blocks from `begin` up to before `last`, by warpgroup number kOwn.
  template <int kOwn, class Output>
  CUTLASS_DEVICE void compute_as(Walk const& walk, int begin, int last, Softmax& softmax,
                                 Output& out) {
    using namespace cute;
    // From here on blocks are numbered as the CTA comes to them.
    uint32_t const end = added_ + last - begin;
    int const first_block = begin - static_cast<int>(added_);
    int const thread = threadIdx.x % kThreads;
    typename Traits::MmaQk mma_qk;
    typename Traits::MmaOwnPv mma_own_pv;
    typename Traits::MmaOtherPv mma_other_pv;
    auto slice_qk = mma_qk.get_thread_slice(thread);
    auto slice_own_pv = mma_own_pv.get_thread_slice(thread);
    auto slice_other_pv = mma_other_pv.get_thread_slice(thread);
    // The first piece of the half.
    auto operand_v = [&](auto& slice_pv, int stage) {
      auto const values =
          make_tensor(make_smem_ptr(values_of<kOwn>(stage)), typename Traits::LayoutVt{});
      return sm90::uniform_operand(slice_pv.make_fragment_B(slice_pv.partition_B(values)));
    };
    constexpr int kPieceBytes = Traits::kPiece * kTileN * sizeof(Element);
    auto out_piece = [&](int piece) {
      auto const layout =
          partition_shape_C(mma_own_pv, Shape<Int<Traits::kWarpgroupM>, Int<Traits::kPiece>>{});
      return make_tensor(out.data() + piece * size(layout), make_layout(layout));
    };
    auto const queries = as_tensor<Traits::kKeyColumns>(shared_.queries.data());
    auto const keys = as_tensor<Traits::kKeyColumns>(shared_.keys[kOwn].data());
    auto const other_p = as_tensor<kTileN>(probabilities_of(1 - kOwn));
    auto const operand_q =
        sm90::uniform_operand(slice_qk.make_fragment_A(slice_qk.partition_A(queries)));
    auto const operand_k =
        sm90::uniform_operand(slice_qk.make_fragment_B(slice_qk.partition_B(keys)));
    auto const operand_p =
        sm90::uniform_operand(slice_other_pv.make_fragment_A(slice_other_pv.partition_A(other_p)));
    auto const own_values = operand_v(slice_own_pv, kOwn);
    auto const other_values = operand_v(slice_other_pv, 1 - kOwn);
    auto scores = partition_fragment_C(mma_qk, Shape<Int<Traits::kWarpgroupM>, Int<kTileN>>{});
    auto probabilities = make_tensor<Element>(sm90::accumulator_as_operand_a(scores.layout()));
    auto score_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
    auto out_rows = make_tensor(out.data(), sm90::accumulator_rows_cols(out.layout()));
    Seen const seen(call_, source_.cache.group, walk, first_accumulator_row());
    float factor[kRows];

    // S of an own block, in flight: of its first columns while others may be on their way.
    auto issue_scores = [&](uint32_t number) CUTLASS_LAMBDA_FUNC_INLINE {
      for_each(make_seq<Traits::kPieces>{}, [&](auto piece) CUTLASS_LAMBDA_FUNC_INLINE {
        constexpr int kPiece = decltype(piece)::value;
        constexpr int kFirst = kPiece * Traits::kPiece / kMmaK;
        constexpr int kRopes = Traits::kHeadDim / kMmaK;
        shared_.full[kOwn][kPiece].wait(phase_of(number));
        see_gathered();
        sm90::issue_gemm<kPiece == 0 ? sm90::Accumulate::kNo : sm90::Accumulate::kYes, kFirst,
                         kFirst + Traits::kPiece / kMmaK>(mma_qk, sm90::described_here(operand_q),
                                                          sm90::described_here(operand_k), scores);
        if constexpr (kPiece == Traits::piece_of_ropes(kOwn)) {
          sm90::issue_gemm<sm90::Accumulate::kYes, kRopes>(mma_qk, sm90::described_here(operand_q),
                                                           sm90::described_here(operand_k), scores);
        }
      });
    };
    // O becomes relative to the maxima that a block's P is relative to. V has landed: S was made
    // of it, and nobody needs it as a key any more.
    auto prepare_values = [&](bool moves, int stage) CUTLASS_LAMBDA_FUNC_INLINE {
      if (moves) Softmax::scale_rows(out_rows, factor);
      int const block = first_block + static_cast<int>(added_);
      Element* const values = values_of<kOwn>(stage);
      if (source_.box_rows > 0) seen.template clear_values_behind<kHalf>(block, values, kOwn);
      if (seen.template clear_values<kHalf>(block, values, kOwn)) {
        shared_.cleared[kOwn] = added_ + 1;
      }
      see_gathered();
    };
    // P of an own block, from its scores, for both warpgroups; whether O is to be multiplied.
    auto make_probabilities = [&](uint32_t number) CUTLASS_LAMBDA_FUNC_INLINE {
      if (number + Traits::kStages >= end) release(shared_.q_empty);
      if (units_.softcap > 0) cap_scores(units_, scores);
      seen.mask(score_rows, first_block + static_cast<int>(number));
      bool const moves = softmax.update(score_rows, factor);
      auto p = make_tensor(scores.data(), sm90::accumulator_as_operand_a(scores.layout()));
      sm90::convert_fragment<Element>(p, probabilities);
      tell_probabilities<kOwn>(probabilities, softmax, factor);
      return moves;
    };
    // O += P V of the next block, in flight.
    auto issue_own_values = [&](bool moves) CUTLASS_LAMBDA_FUNC_INLINE {
      prepare_values(moves, kOwn);
      auto const values = sm90::described_here(own_values);
      CUTLASS_PRAGMA_UNROLL
      for (int piece = 0; piece < Traits::kPiecesOfHalf; ++piece) {
        auto sum = out_piece(piece);
        sm90::issue_gemm<sm90::Accumulate::kYes>(mma_own_pv, probabilities,
                                                 sm90::moved(values, piece * kPieceBytes), sum);
      }
    };
    auto issue_other_values = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      bool const moves = read_maxima<1 - kOwn>(softmax, factor);
      prepare_values(moves, 1 - kOwn);
      auto const p = sm90::described_here(operand_p);
      auto const values = sm90::described_here(other_values);
      CUTLASS_PRAGMA_UNROLL
      for (int piece = 0; piece < Traits::kPiecesOfHalf; ++piece) {
        auto sum = out_piece(piece);
        sm90::issue_gemm<sm90::Accumulate::kYes>(mma_other_pv, p,
                                                 sm90::moved(values, piece * kPieceBytes), sum);
      }
    };
    auto finish_values = [&](int stage) CUTLASS_LAMBDA_FUNC_INLINE {
      warpgroup_wait<1>();
      release_piece<kOwn * Traits::kPiecesOfHalf>(stage);
      sm90::warpgroup_wait_all();
      warpgroup_fence_operand(out);
      release_piece<kOwn * Traits::kPiecesOfHalf + 1>(stage);
      ++added_;
    };
    // A block of one warpgroup's, nothing of which overlaps in it.
    auto add_own = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      issue_scores(added_);
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      bool const moves = make_probabilities(added_);
      issue_own_values(moves);
      finish_values(kOwn);
    };
    auto add_other = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      issue_other_values();
      finish_values(1 - kOwn);
    };

    shared_.q_full.wait(q_phase_);
    q_phase_ ^= 1;
    cutlass::arch::fence_view_async_shared();  // threads have copied queries
    bool const owns_first = added_ % Traits::kStages == kOwn;
    if (!owns_first && added_ + 1 == end) release(shared_.q_empty);
    if constexpr (kOwn == 0) {
      if (owns_first) add_own();
      CUTLASS_PRAGMA_NO_UNROLL
      while (added_ < end) {
        add_other();
        if (added_ < end) add_own();
      }
    } else {
      if (owns_first) add_own();
      // The other warpgroup's block, and an own one, whose scores are there before the other's P,
      // and whose softmax runs while P V of the other one is in flight.
      CUTLASS_PRAGMA_NO_UNROLL
      while (added_ + 1 < end) {
        issue_scores(added_ + 1);
        issue_other_values();
        warpgroup_wait<Traits::kPiecesOfHalf>();
        warpgroup_fence_operand(scores);
        bool const moves = make_probabilities(added_ + 1);
        finish_values(1 - kOwn);
        issue_own_values(moves);
        finish_values(kOwn);
      }
      if (added_ < end) add_other();
    }
    bool const has_cleared = shared_.cleared[kOwn] > static_cast<uint32_t>(begin - first_block);
    if (has_cleared) add_cleared(walk, seen, out_rows);
    add_up_sums(softmax);
  }

  /// The phase of a stage's barriers, and of its warpgroup's P, for block number `number`.
  CUTLASS_DEVICE static uint32_t phase_of(uint32_t number) { return number / Traits::kStages & 1; }

  /// Keys that threads have copied, not TMA, WGMMA reads behind this.
  CUTLASS_DEVICE void see_gathered() const {
    if (source_.box_rows == 0) cutlass::arch::fence_view_async_shared();
  }

  /// Columns of 64 rows.
  template <int kColumns>
  CUTLASS_DEVICE static auto as_tensor(Element* columns) {
    return cute::make_tensor(cute::make_smem_ptr(columns),
                             typename Traits::template LayoutRows<kColumns>{});
  }

  /// A warpgroup's half of V's columns, of the block in a stage.
  template <int kOwn>
  CUTLASS_DEVICE Element* values_of(int stage) const {
    return shared_.keys[stage].columns_from(kOwn * kHalf);
  }
  CUTLASS_DEVICE Element* probabilities_of(int stage) const {
    return shared_.keys[stage].columns_from(Traits::kHeadDim);
  }

  /// Tells the other warpgroup P of an own block, and the maxima that it is relative to.
  template <int kOwn, class Probabilities>
  CUTLASS_DEVICE void tell_probabilities(Probabilities const& p, Softmax const& softmax,
                                         float const (&factor)[kRows]) const {
    using namespace cute;
    // All of the warpgroup's products with the rope columns have been made.
    sm90::barrier_sync(sm90::NamedBarrier::kRopesRead, kOwn, kThreads);
    write_probabilities(p, probabilities_of(kOwn));
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      int const row = first_accumulator_row() + 8 * i;
      if (first_accumulator_column() == 0) {
        shared_.most[row] = softmax.most(i);
        shared_.factor[row] = factor[i];
      }
    }
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    release(shared_.p_full[kOwn]);
  }

  /// P as operand A, of the warp's 16 rows: a store writes 16 columns, of which lane i knows where
  /// row i % 16 of their half i / 16 is.
  template <class Probabilities>
  CUTLASS_DEVICE static void write_probabilities(Probabilities const& p, Element* to) {
    using namespace cute;
    constexpr int kRowsOfWarp = 16;
    constexpr int kVectorBytes = 16;
    static_assert(kTileN * sizeof(Element) == Traits::kSwizzleBytes);
    int const lane = threadIdx.x % cutlass::NumThreadsPerWarp;
    int const row = threadIdx.x % kThreads / cutlass::NumThreadsPerWarp * kRowsOfWarp + lane % 16;
    int const vector = (lane / kRowsOfWarp) ^ (row % 8);  // as the swizzle has it
    auto* const of_row = reinterpret_cast<char*>(to) + row * Traits::kSwizzleBytes;
    auto const words = recast<uint32_t>(p);
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kTileN / kMmaK; ++k) {
      auto* const place = of_row + ((vector ^ 2 * k) * kVectorBytes);
      SM90_U32x4_STSM_N::copy(words(4 * k), words(4 * k + 1), words(4 * k + 2), words(4 * k + 3),
                              *reinterpret_cast<uint128_t*>(place));
    }
  }

  /// Waits for P of the block that is added next, warpgroup kOther's, and reads what comes with it;
  /// whether O is to be multiplied by it, in the warp.
  template <int kOther>
  CUTLASS_DEVICE bool read_maxima(Softmax& softmax, float (&factor)[kRows]) const {
    sm90::wait_memory(shared_.p_full[kOther], phase_of(added_));
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
    auto const* const values =
        static_cast<Element const*>(v.data) + walk.head() * v.head_stride + place().column;
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

  /// Of a stage. One CTA of a pair loads it, and waits for both.
  template <int kPiece>
  CUTLASS_DEVICE void release_piece(int stage) const {
    asm volatile("" ::: "memory");
    if (!cute::elect_one_sync()) return;
    auto const& empty = shared_.empty[stage][kPiece];
    empty.arrive();
    constexpr uint32_t kLoader = Traits::half_of(kPiece);
    if (source_.pairs && blockIdx.y % 2 != kLoader) empty.arrive(kLoader);
  }

  /// One arrival a warp. The compiler moves no access to memory across.
  CUTLASS_DEVICE static void release(cutlass::arch::ClusterBarrier const& barrier) {
    asm volatile("" ::: "memory");
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
