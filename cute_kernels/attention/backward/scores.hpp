#pragma once

#include <algorithm>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/statistics.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// The products S^T = K Q^T and dP^T = V dO^T of a warpgroup's 64 keys, less the queries' lse or
/// delta where WGMMA subtracts it.
template <class Traits>
class BackwardScores {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;

 public:
  /// The keys, of which the first kInRegisters blocks of 16 channels are read into registers now,
  /// and all stages of the queries, in shared memory.
  template <int kInRegisters, class Keys, class Queries>
  CUTLASS_DEVICE static auto operands(Keys const& keys, Queries const& queries, int thread) {
    using namespace cute;
    typename Traits::MmaScoresOfRegisters mma_registers;
    auto some_keys =
        local_tile(keys, Shape<Int<Traits::kWarpgroupN>, Int<16 * std::max(1, kInRegisters)>>{},
                   make_coord(_0{}, _0{}));
    auto slice_registers = mma_registers.get_thread_slice(thread);
    auto in_registers = slice_registers.make_fragment_A(slice_registers.partition_A(some_keys));
    if constexpr (kInRegisters > 0) {
      auto load = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma_registers);
      auto slice = load.get_thread_slice(thread);
      copy(load, slice.partition_S(as_position_independent_swizzle_tensor(some_keys)),
           slice.retile_D(in_registers));
    }
    auto slice = typename Traits::MmaScores{}.get_thread_slice(thread);
    return cute::make_tuple(Int<kInRegisters>{}, in_registers,
                            slice.make_fragment_A(slice.partition_A(keys)),
                            slice.make_fragment_B(slice.partition_B(queries)));
  }

  CUTLASS_DEVICE static auto accumulator() {
    return cute::partition_fragment_C(
        typename Traits::MmaScores{},
        cute::Shape<cute::Int<Traits::kWarpgroupN>, cute::Int<Traits::kTileM>>{});
  }

  /// One group of WGMMAs.
  template <Statistic kLess, class Operands, class Accumulator>
  CUTLASS_DEVICE static void issue(SharedStorage& shared, Operands const& operands, int stage,
                                   int thread, Accumulator& scores) {
    using namespace cute;
    using sm90::Accumulate;
    constexpr int kInRegisters = tuple_element_t<0, Operands>::value;
    constexpr bool kByProduct = Traits::is_by_product(kLess);
    constexpr auto kFirst = kByProduct ? Accumulate::kYes : Accumulate::kNo;
    constexpr auto kRest = kInRegisters > 0 ? Accumulate::kYes : kFirst;
    auto const& keys_in_registers = get<1>(operands);
    auto const& keys = get<2>(operands);
    auto const queries = get<3>(operands)(_, _, _, stage);
    auto const ones = statistic_ones<kLess>(thread);

    auto fence = [&] {
      warpgroup_fence_operand(scores);
      if constexpr (kInRegisters > 0) sm90::fence_read_operand(keys_in_registers);
      if constexpr (kByProduct) sm90::fence_read_operand(ones);
    };
    fence();
    warpgroup_arrive();
    if constexpr (kByProduct) {
      sm90::add_gemm<Accumulate::kNo>(typename Traits::MmaStatistic{}, ones,
                                      statistic_parts(shared, stage, thread), scores);
    }
    if constexpr (kInRegisters > 0) {
      sm90::add_gemm<kFirst>(typename Traits::MmaScoresOfRegisters{}, keys_in_registers, queries,
                             scores);
    }
    if constexpr (kInRegisters < decltype(size<2>(keys))::value) {
      sm90::add_gemm<kRest, kInRegisters>(typename Traits::MmaScores{}, keys, queries, scores);
    }
    warpgroup_commit_batch();
    fence();
  }

 private:
  /// A of the product with a statistic's parts: in every row ones in their columns.
  template <Statistic kStatistic>
  CUTLASS_DEVICE static auto statistic_ones(int thread) {
    using namespace cute;
    using Parts = StatisticParts<Traits::kTileM>;
    constexpr uint32_t kOne = 0x3f80;  // bf16
    constexpr int kFirst = Parts::first_column(kStatistic);
    auto is_part = [](int column) { return column >= kFirst && column < kFirst + Parts::kParts; };
    int const column = thread % 4 * 2;
    auto ones = make_tensor<bfloat16_t>(partition_shape_A(
        typename Traits::MmaStatistic{}, Shape<Int<Traits::kWarpgroupN>, Int<16>>{}));
    auto words = recast<uint32_t>(ones);  // two columns each: rows r and r + 8, then columns + 8
    words(0) = (is_part(column) ? kOne : 0) | (is_part(column + 1) ? kOne << 16 : 0);
    words(1) = words(0);
    words(2) = words(3) = 0;
    return ones;
  }

  /// B of it. WGMMA wants 16 columns: the second 8 are the first once more, times 0.
  CUTLASS_DEVICE static auto statistic_parts(SharedStorage& shared, int stage, int thread) {
    using namespace cute;
    using Columns = Shape<Int<StatisticParts<Traits::kTileM>::kColumns>, _2>;
    constexpr Int<StatisticParts<Traits::kTileM>::kColumns> kRowElements{};
    auto parts = make_tensor(make_smem_ptr(shared.statistics[stage].rows[0].data()),
                             Layout<Shape<Int<Traits::kTileM>, Columns>,
                                    Stride<decltype(kRowElements), Stride<_1, _0>>>{});
    auto slice = typename Traits::MmaStatistic{}.get_thread_slice(thread);
    return slice.make_fragment_B(slice.partition_B(parts));
  }
};

}  // namespace cute_kernels::attention
