#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/fp8_warps_operands.hpp"
#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// The end of a part. Of the warps that had a share of the same rows' keys each, each adds up some
/// chunks of O's columns, of all of them in their order: O stands in shared memory, one of a
/// thread's two rows at a time. All that a thread reads there it reads at a time.
template <class Traits>
class Fp8WarpsJoin {
  using SharedStorage = typename Traits::SharedStorage;
  using Part = typename Traits::Part;
  using Operands = Fp8WarpsOperands<Traits>;

  static constexpr int kRows = 2;
  static constexpr int kLanes = Traits::kLanes;
  static constexpr int kChunks = Traits::kChunks;
  static constexpr int kAllThreads = Traits::kWarps * kLanes;
  static constexpr int kOfChunk = 8;  // a thread's elements of O, in the order of registers
  // Warps that share rows, at least; chunks of one of them, at most.
  static constexpr int kLeastStep = Traits::kWarps * Part::kRows / Traits::kTileRows;
  static constexpr int kMostOwn = (kChunks + kLeastStep - 1) / kLeastStep;
  static constexpr int kWarpsAtOnce = kLeastStep < 4 ? kLeastStep : 4;  // whose O is read

 public:
  /// `rows`: the tile's.
  CUTLASS_DEVICE Fp8WarpsJoin(Part const& part, int warp, int rows, SharedStorage& shared)
      : part_(part), warp_(warp), has_second_rows_(rows > 8), shared_(shared) {}

  /// All consumers. Also behind the writing of a part's queries: who comes there has read all of O
  /// of the part before.
  CUTLASS_DEVICE static void meet() {
    sm90::barrier_sync_memory(sm90::NamedBarrier::kTurnsEnded, 0, kAllThreads);
  }

  /// results(columns, place) for each of the warp's chunks, in which it then has all keys, as
  /// (row, column). `place` is that of the thread's first column of all. The softmax becomes that
  /// of all keys.
  template <class Softmax, class Output, class Results>
  CUTLASS_DEVICE void join(Softmax& softmax, float const (&unit)[kRows], Output const& out,
                           AccumulatorPlace const& place, Results const& results) const {
    float sums[kMostOwn][kOfChunk] = {};
    if constexpr (!Traits::kQueriesApart) meet();  // queries have been read, which lie there
    write_statistics(softmax, unit);
    add_up(softmax, out, 0, sums);
    if (has_second_rows_) {
      meet();  // before anyone writes there again
      add_up(softmax, out, 1, sums);
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (int own = 0; part_.slice + own * part_.step < kChunks; ++own) {
      auto columns = cute::make_tensor<float>(cute::Layout<cute::Int<kOfChunk>>{});
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kMostOwn; ++i) {
        if (i > 0 && i != own) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kOfChunk; ++j) columns(j) = sums[i][j];
      }
      int const chunk = part_.slice + own * part_.step;
      results(Operands::template columns_of<1>(columns.data()),
              AccumulatorPlace{place.row, place.column + chunk * Traits::kChunk});
    }
    if constexpr (!Traits::kQueriesApart) meet();  // before queries are written there
  }

 private:
  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int row_of_warp(int i) { return lane() / 4 + 8 * i; }

  template <class Softmax>
  CUTLASS_DEVICE void write_statistics(Softmax const& softmax, float const (&unit)[kRows]) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (lane() % 4 == 0)
        shared_.statistics[warp_][row_of_warp(i)] = {softmax.statistics(i), unit[i]};
    }
  }

  /// Of row i of a thread's.
  template <class Softmax, class Output>
  CUTLASS_DEVICE void add_up(Softmax& softmax, Output const& out, int i,
                             float (&sums)[kMostOwn][kOfChunk]) const {
    auto const rows = Operands::template output_rows<2>(out);
    float4* const own = &shared_.out[warp_][0][lane()];
    CUTLASS_PRAGMA_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      auto x = [&](int j) { return rows(i, 4 * chunk + j); };
      own[chunk * kLanes] = {x(0), x(1), x(2), x(3)};
    }
    meet();
    int const first = warp_ - part_.slice;
    // Where fewer warps share the rows their statistics are read twice, and count once.
    auto const counts = [&](int w) { return w < kLeastStep || w < part_.step; };
    RowStatistics all{-INFINITY, 0.f};
    typename SharedStorage::OfWarp of_warp[Traits::kWarps];
    CUTLASS_PRAGMA_UNROLL
    for (int w = 0; w < Traits::kWarps; ++w) {
      int const in_group = w < kLeastStep ? w : w & (part_.step - 1);
      of_warp[w] = shared_.statistics[first + in_group][row_of_warp(i)];
    }
    CUTLASS_PRAGMA_UNROLL
    for (int w = 0; w < Traits::kWarps; ++w) all.most = fmaxf(all.most, of_warp[w].keys.most);
    float weight[Traits::kWarps];  // of a warp's O
    CUTLASS_PRAGMA_UNROLL
    for (int w = 0; w < Traits::kWarps; ++w) {
      float const of_keys = softmax.weight(i, of_warp[w].keys.most, all.most);
      all.sum += counts(w) ? of_warp[w].keys.sum * of_keys : 0.f;
      weight[w] = of_warp[w].unit * of_keys;
    }
    softmax.become(i, all);
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kMostOwn; ++j) {
      int const chunk = part_.slice + j * part_.step;
      if (chunk >= kChunks) break;
      CUTLASS_PRAGMA_UNROLL
      for (int w = 0; w < Traits::kWarps; w += kWarpsAtOnce) {
        if (!counts(w)) break;
        float4 x[kWarpsAtOnce];
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < kWarpsAtOnce; ++k) x[k] = shared_.out[first + w + k][chunk][lane()];
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < kWarpsAtOnce; ++k) {
          auto add = [&](int column, float value) {
            sums[j][2 * i + column % 2 * 4 + column / 2] += value * weight[w + k];
          };
          add(0, x[k].x), add(1, x[k].y), add(2, x[k].z), add(3, x[k].w);
        }
      }
    }
  }

  Part const& part_;
  int warp_;
  bool has_second_rows_;
  SharedStorage& shared_;
};

}  // namespace cute_kernels::attention
