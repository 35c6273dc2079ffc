#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/fp8_queries.hpp"
#include "cute_kernels/attention/forward/fp8_result.hpp"
#include "cute_kernels/attention/forward/fp8_softmax.hpp"
#include "cute_kernels/attention/forward/fp8_sums.hpp"
#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/attention/forward/protocol.hpp"
#include "cute_kernels/attention/mask.hpp"
#include "cute_kernels/sm90/dependent_launch.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// ForwardMainloop for 8-bit operands: the same steps.
/// What differs: V stands transposed, scales of Q and K enter the softmax, P is packed to e4m3.
template <class Traits>
class Fp8ForwardMainloop : public ForwardProtocol<Traits> {
  using Protocol = ForwardProtocol<Traits>;
  using Protocol::kTileN;
  using Protocol::pass_turn;
  using Protocol::release;
  using Protocol::release_query;
  using Protocol::wait_turn;
  using typename Protocol::Hint;
  using typename Protocol::Pipeline;
  using typename Protocol::PipelineState;
  using typename Protocol::SharedStorage;

  static constexpr int kGroups = Traits::kScaleGroups;
  static constexpr bool kHasLeftEnd = Traits::Calls::kHasLeftEnd;
  static constexpr int kManyScales = 1 << 30;
  // Of scores to powers of two. As good as 0, but 0 * -inf is NaN.
  static constexpr float kSmallestFactor = 0x1p-100f;
  // Of a query's scale in powers of two: scores so large that the largest one has all the weight,
  // and yet finite with keys up to 2^56.
  static constexpr float kLargestQueryFactor = 0x1p56f;
  static constexpr auto kOntoMagic =
      Traits::kIntegerScores ? sm90::Accumulate::kYes : sm90::Accumulate::kNo;

  using Softmax = ScaledSoftmax<Traits>;
  using Sums = Fp8Sums<Traits>;
  using Result = Fp8Result<Traits>;

 public:
  /// Issues every load of one tile. Called by one thread.
  template <class Params>
  CUTLASS_DEVICE static void load(Params const& params, SharedStorage& shared, Pipeline& pipeline_k,
                                  Pipeline& pipeline_v, PipelineState& write_k,
                                  PipelineState& write_v, uint32_t q_phase,
                                  typename Params::Tile const& coord) {
    using namespace cute;
    int const kv_head = params.heads_per_kv.div(coord.head);
    auto v = domain_offset(
        make_coord(_0{}, params.value_column(coord)),
        params.tma_v.get_tma_tensor(params.shape_v)(_, _, kv_head, params.batch(coord)));
    auto blocks_v =
        local_tile(v, Shape<Int<Traits::kHeadDimV>, Int<kTileN>>{}, make_coord(_0{}, _));
    auto load_v = [&](int block) {
      pipeline_v.producer_acquire(write_v);
      auto stage_v = make_tensor(
          make_smem_ptr(shared.v.data() + write_v.index() * Traits::kValueChannels * kTileN),
          typename Traits::LayoutValueLoad{});
      auto [from_v, to_v] = tma_partition(params.tma_v, _0{}, Layout<_1>{},
                                          group_modes<0, 2>(stage_v), group_modes<0, 2>(blocks_v));
      copy(params.tma_v.with(*pipeline_v.producer_get_barrier(write_v), 0, Hint::EVICT_LAST),
           from_v(_, block), to_v);
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
    Softmax softmax;
    constexpr int kChannels = Traits::kPromoteEach ? Traits::kHeadDimV : Traits::kValueChannels;
    using Mma =
        std::conditional_t<Traits::kPromoteEach, typename Traits::MmaOut, typename Traits::MmaPv>;
    auto out = partition_fragment_C(Mma{}, Shape<Int<Traits::kWarpgroupM>, Int<kChannels>>{});
    clear(out);
    Result::load_value_scales(params, shared, coord, warpgroup);
    compute(params, shared, pipeline_k, pipeline_v, read_k, read_v, q_phase, coord, warpgroup,
            softmax, out);
    auto values = Result::without_ones(out);
    auto rows = make_tensor(values.data(), sm90::accumulator_rows_cols(values.layout()));
    if constexpr (Traits::kAnyCall) {
      Result::add_score_offsets(params, coord, warpgroup, softmax);
      softmax.finalize(rows, params.sink(coord));
    } else {
      softmax.finalize(rows);
    }
    Result::scale_values(shared, warpgroup, rows);
    store(softmax, Result::round_output(params, values));
  }

  /// Writes what stays in shared memory for good: channels of V that are all ones, which TMA never
  /// touches, and what int8 products are added to. Then waits for what the operands come from.
  CUTLASS_DEVICE static void prepare(SharedStorage& shared) {
    if constexpr (Traits::kIntegerScores) {
      if (threadIdx.x < shared.magic.size()) shared.magic[threadIdx.x] = Traits::kMagicBits;
    }
    if constexpr (Traits::kLinearExp) {
      constexpr int kStage = Traits::kValueChannels * kTileN;
      constexpr int kOnes = Traits::kSumChannels * kTileN;
      for (int i = threadIdx.x; i < Traits::kStages * kOnes; i += Traits::kThreads) {
        shared.v[i / kOnes * kStage + Traits::kHeadDimV * kTileN + i % kOnes] =
            typename Traits::ElementPv(1.f);
      }
      cutlass::arch::fence_view_async_shared();
    }
    sm90::wait_for_previous_kernel();
    if constexpr (Traits::kAnyCall) sm90::let_next_kernel_start();
  }

 private:
  /// Computes P V of 64 queries into `out`, not yet divided by the row sums nor scaled by V's
  /// scale.
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
    auto operand_q = slice_qk.make_fragment_A(slice_qk.partition_A(
        make_tensor(make_smem_ptr(shared.q[warpgroup].data()), typename Traits::LayoutQ{})));
    auto operand_k = slice_qk.make_fragment_B(slice_qk.partition_B(
        make_tensor(make_smem_ptr(shared.k.data()), typename Traits::LayoutK{})));
    auto operand_v = slice_pv.make_fragment_B(slice_pv.partition_B(
        make_tensor(make_smem_ptr(shared.v.data()), typename Traits::LayoutV{})));

    auto new_products = [&] {
      auto products = partition_fragment_C(mma_qk, Shape<Int<Traits::kWarpgroupM>, Int<kTileN>>{});
      if constexpr (Traits::kIntegerScores) load_magic(shared, products);
      return products;
    };
    auto probabilities = make_tensor<typename Traits::ElementPv>(
        Layout<Shape<Shape<_4, _2, _2>, _1, Int<kTileN / 32>>>{});
    auto out_rows = make_tensor(out.data(), sm90::accumulator_rows_cols(out.layout()));
    Sums sums(shared, warpgroup);
    auto rescale = [&] {
      softmax.rescale(out_rows);
      if constexpr (Traits::kPromoteSeveral) sums.rescale(softmax.rescale_factors());
    };
    auto count_block = [&] {
      if constexpr (Traits::kPromoteSeveral) sums.count_block(out);
    };

    int const first_query = params.first_query(coord);
    int const own_query = first_query + warpgroup * Traits::kWarpgroupM;
    auto const& mask_of_tile = params.mask_of(coord);
    BlockRange const loaded = mask_of_tile.key_blocks(first_query, Traits::kTileM, kTileN);
    BlockRange const own =
        mask_of_tile.key_blocks_of(loaded, own_query, Traits::kWarpgroupM, kTileN);
    int const begin = kHasLeftEnd ? own.begin : 0;
    int const row = own_query + thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;

    // Blocks of scales that keys have which some query of the warpgroup sees: the others' keys are
    // -inf with any scale but their own, which may be NaN.
    auto last_scale_of = [](auto const& mask, int own_query) {
      int const last_query = min(own_query + Traits::kWarpgroupM, mask.seqlen_q) - 1;
      return (mask.end_key(last_query) - 1) / kScaleRows;
    };
    int const last_scale_of_tile = last_scale_of(mask_of_tile, own_query);
    float const* k_scales = params.k_scale.data +
                            params.entry(coord) * params.k_scale.batch_stride +
                            params.heads_per_kv.div(coord.head) * params.k_scale.head_stride;
    if constexpr (Traits::kAnyCall) k_scales += params.key_block(coord) * params.k_scale.stride;
    asm volatile("" : "+l"(k_scales));  // not computed again in every step
    auto query_block = [&] {
      if constexpr (Traits::kAnyCall) {
        return params.query_block(coord) + own_query / kScaleRows;
      } else {
        return own_query / kScaleRows;
      }
    };
    float q_scale = own.end == begin
                        ? 0.f
                        : params.q_scale.data[params.entry(coord) * params.q_scale.batch_stride +
                                              coord.head * params.q_scale.head_stride +
                                              query_block() * params.q_scale.stride];
    auto is_masked = [&](int block) {
      if constexpr (kHasLeftEnd) return block >= own.right_begin() || block < own.left_end();
      return block >= own.full_end;
    };
    float scale[kGroups];
    // Read before the wait for the products, needed after it.
    auto load_scales = [&](int block) {
      int first_scale = 0, last_scale = last_scale_of_tile;
      if constexpr (kHasLeftEnd) {
        last_scale = kManyScales;
        if (is_masked(block)) {
          auto const again = params.forgotten(coord);  // not kept from step to step
          auto const mask = params.mask_of(again);
          int const own_query = params.first_query(again) + warpgroup * Traits::kWarpgroupM;
          first_scale = mask.first_key(max(0, own_query)) / kScaleRows;
          last_scale = last_scale_of(mask, own_query);
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        int index = min(block * kGroups + group, last_scale);
        if constexpr (kHasLeftEnd) index = max(index, first_scale);
        scale[group] = k_scales[index * params.k_scale.stride];
      }
    };

    // Products -> P in place.
    auto softmax_block = [&](auto& scores, int block, auto is_first, auto const& on_move) {
      auto rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
      if (is_masked(block)) {
        if constexpr (Traits::kAnyCall) {
          auto const again = params.forgotten(coord);
          int const lane = Result::opaque_thread();
          int const row = params.first_query(again) + warpgroup * Traits::kWarpgroupM +
                          lane / 32 * 16 + lane % 32 / 4;
          params.mask_of(again).apply(rows, row, block * kTileN + lane % 4 * 2);
        } else {
          params.mask.apply(rows, row, block * kTileN + column);
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        scale[group] = sm90::max_nan(scale[group] * q_scale, kSmallestFactor);
      }
      if constexpr (Traits::kAnyCall) {
        softmax.template update<decltype(is_first)::value>(rows, scale, on_move, params.exact_lse);
      } else {
        softmax.template update<decltype(is_first)::value>(rows, scale, on_move);
      }
    };

    // Blocks that only the other warpgroups see, behind the last of this one's.
    auto skip_last_blocks = [&] {
      if constexpr (kHasLeftEnd) {
        Protocol::skip_last_blocks(begin - 1, loaded.begin, pipeline_k, pipeline_v, read_k, read_v,
                                   warpgroup);
      }
    };

    shared.q_full[warpgroup].wait(q_phase);
    if constexpr (Traits::kAnyCall) {
      clear_unused_queries<Traits>(shared, warpgroup, mask_of_tile.seqlen_q - own_query);
    }
    int block = loaded.end - 1;
    Protocol::skip_blocks(block, own.end, kHasLeftEnd ? loaded.begin : 0, pipeline_k, pipeline_v,
                          read_k, read_v, warpgroup);
    if (block < begin) {  // no visible key: O stays 0
      release_query(shared, warpgroup);
      return;
    }

    if constexpr (!Traits::kOverlap) {
      q_scale = sm90::min_nan(q_scale * params.scale_log2, kLargestQueryFactor);
      // One step after the other, so that scores and P never need registers at the same time: the
      // other warpgroups keep the tensor cores busy.
      for (; block >= begin; --block) {
        auto products = new_products();
        load_scales(block);
        pipeline_k.consumer_wait(read_k);
        if (block + 1 < own.end) wait_turn(warpgroup);
        sm90::issue_gemm<kOntoMagic>(mma_qk, operand_q, operand_k(_, _, _, read_k.index()),
                                     products);
        if (block + 1 < own.end) pass_turn(warpgroup);
        warpgroup_wait<0>();
        release(pipeline_k, read_k);
        if (block == begin) release_query(shared, warpgroup);
        auto scores = as_float(products);
        softmax_block(scores, block, false_type{}, rescale);
        Softmax::pack(scores, probabilities);
        pipeline_v.consumer_wait(read_v);
        if constexpr (Traits::kPromoteEach) {
          Result::add_slices(shared, read_v.index(), probabilities, softmax, out);
          release(pipeline_v, read_v);
        } else {
          sm90::issue_gemm<sm90::Accumulate::kYes>(mma_pv, probabilities,
                                                   operand_v(_, _, _, read_v.index()), out);
          warpgroup_wait<0>();
          release(pipeline_v, read_v);
          Result::take_sums(out, softmax);
          if (block > begin) count_block();
        }
      }
    } else {
      // Prologue: the first block's scores, nothing to overlap with yet.
      {
        auto products = new_products();
        load_scales(block);
        pipeline_k.consumer_wait(read_k);
        sm90::issue_gemm<kOntoMagic>(mma_qk, operand_q, operand_k(_, _, _, read_k.index()),
                                     products);
        warpgroup_wait<0>();
        release(pipeline_k, read_k);
        if (block == begin) release_query(shared, warpgroup);
        // Not sooner, as the compiler would: Q's scale comes from device memory meanwhile.
        asm volatile("" : "+f"(q_scale));
        q_scale = sm90::min_nan(q_scale * params.scale_log2, kLargestQueryFactor);
        auto scores = as_float(products);
        softmax_block(scores, block, true_type{}, [] {});
        Softmax::pack(scores, probabilities);
      }

      // Steady state: this step's Q K^T and the last step's P V are issued back to back; the
      // softmax of the new scores runs while P V is in flight.
      auto k_token = pipeline_k.consumer_test_wait(read_k);
      while (block > begin) {
        --block;
        auto products = new_products();
        load_scales(block);
        pipeline_k.consumer_wait(read_k, k_token);
        wait_turn(warpgroup);
        sm90::issue_gemm<kOntoMagic>(mma_qk, operand_q, operand_k(_, _, _, read_k.index()),
                                     products);
        pipeline_v.consumer_wait(read_v);
        sm90::issue_gemm<sm90::Accumulate::kYes>(mma_pv, probabilities,
                                                 operand_v(_, _, _, read_v.index()), out);
        pass_turn(warpgroup);
        warpgroup_wait<1>();
        release(pipeline_k, read_k);
        if (block == begin) release_query(shared, warpgroup);
        auto scores = as_float(products);
        bool origins_moved = false;
        softmax_block(scores, block, false_type{}, [&] { origins_moved = true; });
        // Two waits on purpose: without a branch here the compiler moves most of the exponentials
        // behind the wait. A branch that a warpgroup's warps take together, as PTX asks for.
        if (block == begin) {
          warpgroup_wait<0>();
        } else {
          sm90::warpgroup_wait_all();
        }
        if (origins_moved) rescale();
        release(pipeline_v, read_v);
        if (block > begin) k_token = pipeline_k.consumer_test_wait(read_k);
        Softmax::pack(scores, probabilities);
        count_block();
      }

      // Tail: the last block's P V.
      pipeline_v.consumer_wait(read_v);
      sm90::issue_gemm<sm90::Accumulate::kYes>(mma_pv, probabilities,
                                               operand_v(_, _, _, read_v.index()), out);
      warpgroup_wait<0>();
      release(pipeline_v, read_v);
    }
    if constexpr (Traits::kPromoteSeveral) sums.add_to(out);
    skip_last_blocks();
  }

  /// Sets all products to Traits::kMagicBits. A load sets four, a move one: instructions are short,
  /// shared memory's bandwidth is not, but for what Traits::kMovesOfFour says.
  template <class Products>
  CUTLASS_DEVICE static void load_magic(SharedStorage const& shared, Products& products) {
    using namespace cute;
    static_assert(decltype(size(products))::value % 4 == 0);
    uint32_t const address = cast_smem_ptr_to_uint(shared.magic.data());
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(products); i += 4) {
      if (i / 4 % 4 >= 4 - Traits::kMovesOfFour) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = i; j < i + 4; ++j) {
          asm volatile("mov.b32 %0, %1;" : "=r"(products(j)) : "n"(Traits::kMagicBits));
        }
        continue;
      }
      asm volatile("ld.volatile.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(products(i)), "=r"(products(i + 1)), "=r"(products(i + 2)),
                     "=r"(products(i + 3))
                   : "r"(address));
    }
  }

  /// The products as floats; of int8, with Traits::kMagic added. In registers of their own: in
  /// place, ptxas serialises the WGMMAs (C7514).
  template <class Products>
  CUTLASS_DEVICE static auto as_float(Products const& products) {
    using namespace cute;
    auto scores = make_tensor<float>(products.layout());
    copy(recast<float>(products), scores);
    return scores;
  }
};

}  // namespace cute_kernels::attention
