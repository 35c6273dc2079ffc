#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/places.hpp"
#include "cute_kernels/attention/forward/protocol.hpp"
#include "cute_kernels/attention/forward/softmax.hpp"
#include "cute_kernels/attention/forward/value_guard.hpp"
#include "cute_kernels/attention/ranges.hpp"
#include "cute_kernels/attention/variant/shared_mask.hpp"
#include "cute_kernels/attention/variant/variant.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/opaque.hpp"
#include "cute_kernels/sm90/uniform.hpp"
#include "cute_kernels/sm90/warp_gemm.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// Loads and products of one tile of queries (FlashAttention-3, arXiv 2407.08608, section 3,
/// algorithms 1 and 2).
template <class Traits>
class ForwardMainloop : public ForwardProtocol<Traits> {
  using Element = typename Traits::Element;
  using Protocol = ForwardProtocol<Traits>;
  using Protocol::kTileN;
  using Protocol::pass_turn;
  using Protocol::release;
  using Protocol::release_query;
  using Protocol::release_step;
  using Protocol::wait_turn;
  using typename Protocol::Hint;
  using typename Protocol::Pipeline;
  using typename Protocol::PipelineState;
  using typename Protocol::SharedStorage;

  using Softmax = OnlineSoftmax<2, typename Traits::ProbabilityRange, Traits::kSumInPairs>;
  using Guard = ValueGuard<Traits>;
  using Variant = typename Traits::Variant;

  static constexpr int kWarpM = 16;
  static constexpr int kKeysOfOrigin = 16;
  static constexpr int kSeekNoMore = 1 << 30;
  static constexpr bool kHasLeftEnd = Traits::Calls::kHasLeftEnd;
  static constexpr bool kHasBlockMask = Variant::kHasBlockMask;

 public:
  /// What a mainloop writes to shared memory once, before any load.
  CUTLASS_DEVICE static void prepare(SharedStorage& shared) {
    if (threadIdx.x == 0) Guard::prepare(shared);
    if constexpr (Traits::kAnyCall) {
      sm90::wait_for_previous_kernel();  // it lists the tiles
      sm90::let_next_kernel_start();     // the next call's list is begun when this one ends
    }
  }

  /// The work of a warp that the producer has to spare, in a second pass.
  template <class Params>
  CUTLASS_DEVICE static void guard(Params const& params, SharedStorage& shared) {
    Guard::watch(params, shared, shared.passes.first_v_stage);
  }

  template <class Params>
  CUTLASS_DEVICE static void restore(Params const& params) {
    Guard::restore(params);
  }

  /// Issues every load of one tile. Called by one thread.
  template <class Params>
  CUTLASS_DEVICE static void load(Params const& params, SharedStorage& shared, Pipeline& pipeline_k,
                                  Pipeline& /*pipeline_v*/, PipelineState& write_k,
                                  PipelineState& write_v, uint32_t q_phase,
                                  typename Params::Tile const& coord) {
    using namespace cute;
    int const kv_head = params.heads_per_kv.div(coord.head);
    auto v = rows_of_head(params.tma_v, params.shape_v, kv_head, params.batch(coord),
                          params.row_k(coord));
    auto blocks_v =
        local_tile(v, Shape<Int<kTileN>, Int<Traits::kHeadDimV>>{}, make_coord(_, _0{}));
    auto stages_v = make_tensor(make_smem_ptr(shared.v.data()), typename Traits::LayoutV{});
    auto route_v = tma_partition(params.tma_v, _0{}, Layout<_1>{}, group_modes<0, 2>(stages_v),
                                 group_modes<0, 2>(blocks_v));
    // Blocks before and from here on go through the guard; with a block mask all of them.
    int guarded_before = 0, guarded_from = 1 << 30;
    if (shared.passes.guarded) {
      BlockRange const keys = Guard::blocks(params, coord);
      guarded_before = keys.left_end();
      guarded_from = keys.right_begin();
    }
    auto load_v = [&](int block) {
      bool const guarded = block >= guarded_from || (kHasLeftEnd && block < guarded_before);
      uint64_t* const landed = Guard::acquire(shared, write_v, guarded);
      copy(params.tma_v.with(*landed, 0, Hint::EVICT_LAST), get<0>(route_v)(_, block),
           get<1>(route_v)(_, write_v.index()));
      ++write_v;
    };
    Protocol::load_tile(params, shared, pipeline_k, write_k, q_phase, coord, kv_head, load_v);
  }

  /// One tile of queries from loads to store(softmax, O).
  template <class Params, class Store>
  CUTLASS_DEVICE static void compute_tile(Params const& params, SharedStorage& shared,
                                          Pipeline& pipeline_k, Pipeline& pipeline_v,
                                          PipelineState& read_k, PipelineState& read_v,
                                          uint32_t q_phase, typename Params::Tile const& coord,
                                          int warpgroup, Store const& store) {
    using namespace cute;
    Softmax softmax(params.scale_log2);
    auto out = partition_fragment_C(typename Traits::MmaPv{},
                                    Shape<Int<Traits::kWarpgroupM>, Int<Traits::kHeadDimV>>{});
    clear(out);
    compute(params, shared, pipeline_k, pipeline_v, read_k, read_v, q_phase, coord, warpgroup,
            softmax, out);
    auto out_rows = make_tensor(out.data(), sm90::accumulator_rows_cols(out.layout()));
    if constexpr (Traits::kGroupedRows) {
      int const row = first_row(params, coord, warpgroup);
      float const sinks[] = {params.sink(coord, row), params.sink(coord, row + 8)};
      softmax.finalize(out_rows, sinks);
    } else if constexpr (Traits::kAnyCall) {
      softmax.finalize(out_rows, params.sink(coord));
    } else {
      softmax.finalize(out_rows);
    }
    auto rounded = make_tensor<Element>(out.layout());
    sm90::convert_fragment<Element>(out, rounded);
    if (params.mask_of(coord).hides_values() && !are_finite(params, coord, warpgroup, rounded)) {
      shared.passes.wanted = true;
    }
    store(softmax, rounded);
  }

 private:
  /// The thread's first row of a tile; its other one is 8 rows on.
  template <class Params>
  CUTLASS_DEVICE static int first_row(Params const& params, typename Params::Tile const& coord,
                                      int warpgroup) {
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    return params.first_query(coord) + warpgroup * Traits::kWarpgroupM + thread / 32 * kWarpM +
           thread % 32 / 4;
  }

  /// Whether the thread's part of the output is, of rows that the sequence has: others are another
  /// sequence's queries, or none's.
  template <class Params, class Output>
  CUTLASS_DEVICE static bool are_finite(Params const& params, typename Params::Tile const& coord,
                                        int warpgroup, Output const& out) {
    if constexpr (!Traits::kAnyCall) return Guard::all_finite(out);
    auto const rows = cute::make_tensor(out.data(), sm90::accumulator_rows_cols(out.layout()));
    int const query = first_row(params, coord, warpgroup);
    int const seqlen_q = params.mask_of(coord).seqlen_q;
    bool finite = true;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < 2; ++row) {
      finite &= query + 8 * row >= seqlen_q || Guard::all_finite(rows(row, cute::_));
    }
    return finite;
  }

  /// Of the block at a place, what all heads share.
  template <class Params, class Walk>
  CUTLASS_DEVICE static KnownMask<kTileN> known_mask(Params const& params, Walk const& walk,
                                                     int place) {
    using Bits = SharedMask<kTileN>;
    static_assert(Traits::kConsumers * cutlass::NumThreadsPerWarpGroup == Bits::kThreads);
    uint32_t const* const words = params.variant.shared_mask;
    int const slot =
        Bits::slot_of(place / Bits::kBlocksOfUnit, walk.places.end / Bits::kBlocksOfUnit);
    if (words == nullptr || sm90::uniform(slot) < 0) return {nullptr};
    // Warpgroup 0 is the producer.
    int const thread = sm90::opaque(threadIdx.x) - cutlass::NumThreadsPerWarpGroup;
    return {words + Bits::place(walk.row.number(), slot, place % Bits::kBlocksOfUnit, thread)};
  }

  /// Computes softmax(scale Q K^T) V, not yet divided by the row sums, of 64 queries into `out`.
  template <class Params, class Output>
  CUTLASS_DEVICE static void compute(Params const& params, SharedStorage& shared,
                                     Pipeline& pipeline_k, Pipeline& pipeline_v,
                                     PipelineState& read_k, PipelineState& read_v, uint32_t q_phase,
                                     typename Params::Tile const& coord, int warpgroup,
                                     Softmax& softmax, Output& out) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    typename Traits::MmaQk mma_qk;
    typename Traits::MmaPv mma_pv;
    auto slice_qk = mma_qk.get_thread_slice(thread);
    auto slice_pv = mma_pv.get_thread_slice(thread);
    auto shared_q =
        make_tensor(make_smem_ptr(shared.q[warpgroup].data()), typename Traits::LayoutQ{});
    auto operand_q = slice_qk.make_fragment_A(slice_qk.partition_A(shared_q));
    auto shared_k = make_tensor(make_smem_ptr(shared.k.data()), typename Traits::LayoutK{});
    auto operand_k = slice_qk.make_fragment_B(slice_qk.partition_B(shared_k));
    auto operand_v = slice_pv.make_fragment_B(slice_pv.partition_B(
        make_tensor(make_smem_ptr(shared.v.data()), typename Traits::LayoutVt{})));

    auto scores = partition_fragment_C(mma_qk, Shape<Int<Traits::kWarpgroupM>, Int<kTileN>>{});
    auto probabilities = make_tensor<Element>(sm90::accumulator_as_operand_a(scores.layout()));
    auto out_rows = make_tensor(out.data(), sm90::accumulator_rows_cols(out.layout()));

    int const first_query = params.first_query(coord);
    int const own_query = first_query + warpgroup * Traits::kWarpgroupM;
    // What the producer loads for the CTA, and what of it this warpgroup's queries see: of a block
    // mask's all is computed.
    auto const& mask_of_tile = params.mask_of(coord);
    auto const walk = key_walk<Traits>(params, coord, mask_of_tile, first_query);
    BlockRange const& loaded = walk.places;
    BlockRange const own = [&] {
      if constexpr (kHasBlockMask) return loaded;
      return mask_of_tile.key_blocks_of(loaded, own_query, Traits::kWarpgroupM, kTileN);
    }();

    // The keys before the end of what the warp's first row sees, which is the first end.
    auto first_end = [&](typename Params::Tile const& tile) {
      int const warp = cutlass::canonical_warp_idx_sync() % cutlass::NumWarpsPerWarpGroup;
      return params.mask_of(tile).end_key(params.first_query(tile) +
                                          warpgroup * Traits::kWarpgroupM + warp * kWarpM);
    };
    // From here on rows' maxima are sought: until every row has an origin that lasts, and where
    // maxima have risen too fast to do without.
    constexpr int kKeysSought = Softmax::kHasMargin ? 1 : kKeysOfOrigin;
    int seek_from = max(0, first_end(coord) - kKeysSought) / kTileN;
    // Before here a window's left end hides keys of some row: they are sought, as that masks.
    int seek_before = 0;
    if constexpr (kHasLeftEnd) {
      int const warp = cutlass::canonical_warp_idx_sync() % cutlass::NumWarpsPerWarpGroup;
      seek_before =
          (mask_of_tile.first_key(own_query + (warp + 1) * kWarpM - 1) + kTileN - 1) / kTileN;
    }
    auto seeks = [&](int block) {
      return block >= seek_from || (kHasLeftEnd && block < seek_before);
    };
    // Where the elements of a block's scores stand.
    auto const places = places_of<Variant>(params, coord);
    auto place_in = [&](int block) {
      int const lane = sm90::opaque(thread);
      int const query = own_query + lane / 32 * kWarpM + lane % 32 / 4;
      int const key = block * kTileN + lane % 4 * 2;
      return [=, &places](int row, int col) {
        return places.template at<Variant>(query + 8 * row, key + 8 * (col / 2) + col % 2);
      };
    };
    bool is_near = true;  // as gives_exponents() keeps it, of the tile
    // Scores -> P in place. Q and K must still be there.
    auto softmax_block = [&](int block, bool seek, auto const& shown, auto const& on_move) {
      auto rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
      auto mask = [&] {
        if (shown.is_known()) return;
        int const lane = sm90::opaque(thread);  // not kept from step to step
        auto const again = params.forgotten(coord);
        auto const& mask = params.mask_of(again);
        int const row = params.first_query(again) + warpgroup * Traits::kWarpgroupM +
                        lane / 32 * kWarpM + lane % 32 / 4;
        bool hides = mask.end_key(row) < (block + 1) * kTileN;
        if constexpr (kHasLeftEnd) hides |= mask.first_key(row + 8) > block * kTileN;
        if (hides) mask.apply(rows, row, block * kTileN + lane % 4 * 2);
      };
      auto overflow = [&] {
        // No mask: the block would have been sought.
        auto own_q = local_tile(shared_q, Shape<Int<kWarpM>, Int<Traits::kHeadDim>>{},
                                make_coord(sm90::opaque(thread) / 32, _0{}));
        sm90::warp_gemm(own_q, shared_k(_, _, sm90::opaque(read_k.index())), scores);
        if constexpr (Variant::kScores) Variant::change_again(params, rows, place_in(block));
        shown.hide_others(rows, -INFINITY);
        // Every second time as many blocks more as it took to come here: a tile starts few blocks
        // again, and where it does so once, its origins' margin is likely to be enough.
        if (Softmax::kHasMargin && seek_from < kSeekNoMore) {
          seek_from = kSeekNoMore;
        } else {
          auto const again = params.forgotten(coord);
          auto const walk =
              key_walk<Traits>(params, again, params.mask_of(again), params.first_query(again));
          seek_from = 2 * sm90::opaque(block) - walk.block(walk.places.end - 1) - 1;
        }
      };
      // Whether the margin replaces a second look at more keys.
      auto few = [&] {
        return first_end(params.forgotten(coord)) - kKeysOfOrigin < block * kTileN;
      };
      // Whether exponents come straight from the scores, none of which need be known then.
      auto straight = Exponents::kNone;
      if constexpr (Variant::kHasExponents) {
        if (!seek) straight = Variant::gives_exponents(params, rows, is_near);
      }
      if constexpr (Variant::kScores) {
        if (straight == Exponents::kNone) Variant::change(params, rows, place_in(block));
      }
      shown.hide_others(rows, -INFINITY);
      auto exponents = [&](auto const& exponentiate) {
        if constexpr (Variant::kHasExponents) {
          if (straight != Exponents::kNone) {
            return Variant::exponents(params, straight, exponentiate);
          }
        }
        exponentiate();
      };
      softmax.update(rows, seek, few, mask, exponents, overflow, on_move);
      if constexpr (Variant::kWeighs) Variant::weigh(params, rows, place_in(block));
    };
    // What there is to say of the block at a place before its scores are there: with hooks its
    // number, whether rows may see the first of their keys there, and what hooks show of it.
    auto ask = [&](int place) {
      auto shown = [&](int block, bool is_full, auto const&... known) {
        auto const rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
        return shown_elements<Variant>(
            params, rows, [&] { return place_in(block); }, is_full, known...);
      };
      if constexpr (kHasBlockMask) {
        BlockEntry const entry{sm90::uniform(walk.entry(place).packed)};
        int const block = walk.block(entry, place);
        if constexpr (shares_mask<Variant>()) {
          auto const known = [&](auto& words) { return known_mask(params, walk, place)(words); };
          return cute::make_tuple(block, !entry.is_full(), shown(block, entry.is_full(), known));
        } else {
          return cute::make_tuple(block, !entry.is_full(), shown(block, entry.is_full()));
        }
      } else if constexpr (Variant::kHides) {
        return cute::make_tuple(place, false, shown(place, false));
      } else {
        return place;
      }
    };
    auto softmax_of = [&](auto const& asked, bool seek, auto const& on_move) {
      if constexpr (kHasBlockMask || Variant::kHides) {
        auto const& [block, begins, shown] = asked;
        bool const seeks_first = begins && softmax.begins();
        softmax_block(block, seek || seeks_first || seeks(block), shown, on_move);
      } else {
        softmax_block(asked, seek || seeks(asked), AllShown{}, on_move);
      }
    };
    auto round_probabilities = [&] {
      auto p = make_tensor(scores.data(), sm90::accumulator_as_operand_a(scores.layout()));
      sm90::convert_fragment<Element>(p, probabilities);
    };

    shared.q_full[warpgroup].wait(q_phase);
    int place = loaded.end - 1;
    Protocol::skip_blocks(place, own.end, loaded.begin, pipeline_k, pipeline_v, read_k, read_v,
                          warpgroup);
    if (place < own.begin) {  // no visible key: O stays 0
      release_query(shared, warpgroup);
      return;
    }

    // Prologue: the first block's scores, nothing to overlap with yet.
    pipeline_k.consumer_wait(read_k);
    sm90::issue_gemm<sm90::Accumulate::kNo>(mma_qk, operand_q, operand_k(_, _, _, read_k.index()),
                                            scores);
    auto const asked_first = ask(place);
    warpgroup_wait<0>();
    release(pipeline_k, read_k);  // the first block's scores are never needed again
    softmax_of(asked_first, true, [](auto const&) {});

    // Steady state: this step's Q K^T and the last step's P V are issued back to back; the softmax
    // of the new scores runs while P V is in flight.
    while (place > own.begin) {
      --place;
      auto const k_token = pipeline_k.consumer_test_wait(read_k);  // answered while P is rounded
      round_probabilities();
      pipeline_k.consumer_wait(read_k, k_token);
      wait_turn(warpgroup);
      sm90::issue_gemm<sm90::Accumulate::kNo>(mma_qk, sm90::described_here(operand_q),
                                              operand_k(_, _, _, read_k.index()), scores);
      pipeline_v.consumer_wait(read_v);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_pv, probabilities,
                                               operand_v(_, _, _, read_v.index()), out);
      pass_turn(warpgroup);
      auto const asked = ask(place);
      warpgroup_wait<Traits::kOverlap ? 1 : 0>();
      softmax_of(asked, false, [&](auto const& factors) {
        warpgroup_wait<0>();
        Softmax::scale_rows(out_rows, factors);
      });
      // The softmax ends with a branch, which keeps the exponentials on this side of the wait.
      sm90::warpgroup_wait_all();
      release_step(shared, read_k, read_v);
    }
    release_query(shared, warpgroup);

    // Tail: the last block's P V.
    round_probabilities();
    pipeline_v.consumer_wait(read_v);
    sm90::issue_gemm<sm90::Accumulate::kYes>(mma_pv, probabilities,
                                             operand_v(_, _, _, read_v.index()), out);
    warpgroup_wait<0>();
    release(pipeline_v, read_v);
    if constexpr (kHasLeftEnd) {
      Protocol::skip_last_blocks(place - 1, loaded.begin, pipeline_k, pipeline_v, read_k, read_v,
                                 warpgroup);
    }
  }
};

}  // namespace cute_kernels::attention
