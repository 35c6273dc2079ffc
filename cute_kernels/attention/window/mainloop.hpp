#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/softmax.hpp"
#include "cute_kernels/attention/forward/value_guard.hpp"
#include "cute_kernels/attention/window/epilogue.hpp"
#include "cute_kernels/attention/window/load.hpp"
#include "cute_kernels/attention/window/mask.hpp"
#include "cute_kernels/attention/window/params.hpp"
#include "cute_kernels/attention/window/value_guard.hpp"
#include "cute_kernels/sm90/tma_pipeline.hpp"
#include "cute_kernels/sm90/uniform.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// A consumer warpgroup: 64 rows of each of the CTA's tiles, whose keys are one block. So there is
/// no step to overlap with: the warpgroups, which nothing holds together but the loads, hide one
/// another's latencies.
template <class Traits>
class WindowMainloop {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Softmax = OnlineSoftmax<2, typename Traits::ProbabilityRange, Traits::kSumInPairs>;
  using Epilogue = WindowEpilogue<Traits>;

  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kWarpgroupM = Traits::kWarpgroupM;

 public:
  /// All of the CTA's tiles, in as many passes as there are. Returns when their stores are
  /// complete.
  CUTLASS_DEVICE static void compute(WindowParams const& params, SharedStorage& shared,
                                     int warpgroup) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    int const lane = thread % cutlass::NumThreadsPerWarp;
    int const warp = cutlass::canonical_warp_idx_sync() % cutlass::NumWarpsPerWarpGroup;
    typename Traits::MmaQk mma_qk;
    typename Traits::MmaPv mma_pv;
    auto slice_qk = mma_qk.get_thread_slice(thread);
    auto slice_pv = mma_pv.get_thread_slice(thread);
    auto operand_q = slice_qk.make_fragment_A(slice_qk.partition_A(
        make_tensor(make_smem_ptr(shared.q[0] + warpgroup * kWarpgroupM * Traits::kHeadDim),
                    typename Traits::LayoutQ{})));
    auto operand_k = slice_qk.make_fragment_B(
        slice_qk.partition_B(make_tensor(make_smem_ptr(shared.k[0]), typename Traits::LayoutK{})));
    auto operand_v = slice_pv.make_fragment_B(
        slice_pv.partition_B(make_tensor(make_smem_ptr(shared.v[0]), typename Traits::LayoutVt{})));

    // The warp's rows in a tile.
    int const first_row = warpgroup * kWarpgroupM + warp * Traits::kWarpM;
    WindowRows const rows(params, first_row, lane);

    int q_stage = 0, kv_stage = 0;
    uint32_t q_phase = 0, kv_phase = 0;
    auto next_tile = [&] {
      if (++q_stage < Traits::kQueryStages) return;
      q_stage = 0;
      q_phase ^= 1;
    };
    CUTLASS_PRAGMA_NO_UNROLL
    while (true) {
      shared.q_full[q_stage].wait(q_phase);
      SeenTile const tile = WindowLoader<Traits>::told(shared, q_stage);
      if (sm90::uniform(tile.queries) == 0) {
        sm90::arrive_if(elect_one_sync(), shared.q_empty[q_stage]);
        next_tile();
        Epilogue::drain();
        if (sm90::uniform(shared.passes.go_on())) continue;
        break;
      }
      int const shift = params.keys.shift(warpgroup * params.keys.queries);
      shared.kv_full[kv_stage].wait(kv_phase);
      int const key_bytes = kv_stage * Traits::kStageBytes + shift * Traits::kRowBytes;

      auto scores = partition_fragment_C(mma_qk, Shape<Int<kWarpgroupM>, Int<kKeys>>{});
      sm90::issue_gemm<sm90::Accumulate::kNo>(mma_qk,
                                              sm90::moved(operand_q, q_stage * Traits::kBytesQ),
                                              sm90::moved(operand_k, key_bytes), scores);
      WindowBlockMask<kKeys> const mask(tile, shift, rows.first, rows.last, rows.query[0],
                                        rows.query[1], lane);
      float const sinks[] = {rows.sink(params, tile, 0), rows.sink(params, tile, 1)};
      warpgroup_wait<0>();
      sm90::arrive_if(elect_one_sync(), shared.q_empty[q_stage]);

      Softmax softmax(params.scale_log2);
      auto score_rows = make_tensor(scores.data(), sm90::accumulator_rows_cols(scores.layout()));
      softmax.update(
          score_rows, true, [] { return false; }, [&] { mask.apply(score_rows); },
          [](auto const&) {}, [] {}, [](auto const&) {});
      // An accumulator of kTileN columns.
      using Columns = Layout<Shape<Shape<_2, _2, Int<Traits::kTileN / 8>>, _1, _1>>;
      auto probabilities = make_tensor<Element>(sm90::accumulator_as_operand_a(Columns{}));
      auto seen = make_tensor(probabilities.data(), scores.layout());
      sm90::convert_fragment<Element>(scores, seen);
      CUTLASS_PRAGMA_UNROLL
      for (int i = size(scores); i < size(probabilities); ++i) probabilities.data()[i] = Element(0);

      auto out = partition_fragment_C(mma_pv, Shape<Int<kWarpgroupM>, Int<Traits::kHeadDimV>>{});
      sm90::issue_gemm<sm90::Accumulate::kNo>(mma_pv, probabilities,
                                              sm90::moved(operand_v, key_bytes), out);
      warpgroup_wait<0>();
      sm90::arrive_if(elect_one_sync(), shared.kv_empty[kv_stage]);

      auto out_rows = make_tensor(out.data(), sm90::accumulator_rows_cols(out.layout()));
      softmax.finalize(out_rows, sinks);
      auto rounded = make_tensor<Element>(out.layout());
      sm90::convert_fragment<Element>(out, rounded);
      if (!ValueGuard<Traits>::all_finite(rounded)) note(shared, tile, rows);
      Epilogue::store(params, shared, tile, rows, softmax, sinks, rounded);

      next_tile();
      if (++kv_stage == Traits::kStages) {
        kv_stage = 0;
        kv_phase ^= 1;
      }
    }
  }

  /// What guarded passes have cleared, to the rows that see it. Of all consumers.
  CUTLASS_DEVICE static void restore(WindowParams const& params) {
    int const thread = threadIdx.x - cutlass::NumThreadsPerWarpGroup;
    for (WindowTiles tiles(params); tiles.valid(); tiles.advance()) {
      auto const [tile, head_kv] = tiles.place();
      WindowValueGuard<Element>::restore(params, tile, head_kv, Traits::kTileM, thread,
                                         Traits::kConsumerThreads);
    }
  }

 private:
  /// Some result of the thread is not finite. Rows behind the sequence's last one do not count.
  CUTLASS_DEVICE static void note(SharedStorage& shared, SeenTile const& tile,
                                  WindowRows const& rows) {
    if (rows.query[0] < tile.queries) shared.passes.wanted = true;
  }
};

}  // namespace cute_kernels::attention
