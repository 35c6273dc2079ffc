#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/fp8_warps_operands.hpp"
#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// The end of a part. Where several warps had a share of the keys each, each of them adds up some
/// chunks of O's columns: what it has of the others' it hands over through the memory of its
/// queries, which no one else uses, one of a thread's two rows at a time.
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

 public:
  /// `rows`: the tile's.
  CUTLASS_DEVICE Fp8WarpsJoin(Part const& part, int warp, int rows, SharedStorage& shared)
      : part_(part), warp_(warp), has_second_rows_(rows > 8), shared_(shared) {}

  /// results(columns, place) for each of the warp's chunks, in which it then has all keys, as
  /// (row, column). `place` is that of the thread's first column of all. The softmax becomes that
  /// of all keys.
  template <class Softmax, class Output, class Results>
  CUTLASS_DEVICE void join(Softmax& softmax, Output& out, AccumulatorPlace const& place,
                           Results const& results) const {
    if (part_.step > 1) {
      write_statistics(softmax);
      exchange(softmax, out, 0);
      if (has_second_rows_) exchange(softmax, out, 1);
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (int own = part_.slice; own < kChunks; own += part_.step) {
      auto columns = cute::make_tensor<float>(cute::Layout<cute::Int<kOfChunk>>{});
      CUTLASS_PRAGMA_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (chunk != own) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kOfChunk; ++i) columns(i) = out(kOfChunk * chunk + i);
      }
      results(Operands::template columns_of<1>(columns.data()),
              AccumulatorPlace{place.row, place.column + own * Traits::kChunk});
    }
  }

 private:
  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static void meet() {
    sm90::barrier_sync_memory(sm90::NamedBarrier::kTurnsEnded, 0, kAllThreads);
  }
  CUTLASS_DEVICE static int row_of_warp(int i) { return lane() / 4 + 8 * i; }

  template <class Softmax>
  CUTLASS_DEVICE void write_statistics(Softmax const& softmax) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (lane() % 4 == 0) shared_.statistics[warp_][row_of_warp(i)] = softmax.statistics(i);
    }
  }

  /// Of row i of a thread's.
  template <class Softmax, class Output>
  CUTLASS_DEVICE void exchange(Softmax& softmax, Output& out, int i) const {
    auto rows = Operands::template output_rows<2>(out);
    auto* const own = reinterpret_cast<float4*>(shared_.q[warp_]) + lane();
    CUTLASS_PRAGMA_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      auto x = [&](int j) { return rows(i, 4 * chunk + j); };
      own[chunk * kLanes] = {x(0), x(1), x(2), x(3)};
    }
    meet();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int further = 1; further < part_.step; ++further) {
      int const other = part_.first_warp() + (part_.slice + further) % part_.step;
      auto const* const theirs = reinterpret_cast<float4 const*>(shared_.q[other]) + lane();
      float factor, factor_of_theirs;
      softmax.join(i, shared_.statistics[other][row_of_warp(i)], factor, factor_of_theirs);
      CUTLASS_PRAGMA_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (chunk % part_.step != part_.slice) continue;
        float4 const x = theirs[chunk * kLanes];
        auto add = [&](int j, float value) {
          float& sum = rows(i, 4 * chunk + j);
          sum = sum * factor + value * factor_of_theirs;
        };
        add(0, x.x), add(1, x.y), add(2, x.z), add(3, x.w);
      }
    }
    meet();  // before anyone writes there again
  }

  Part const& part_;
  int warp_;
  bool has_second_rows_;
  SharedStorage& shared_;
};

}  // namespace cute_kernels::attention
