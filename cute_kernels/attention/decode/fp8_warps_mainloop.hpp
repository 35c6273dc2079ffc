#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/fp8_scales.hpp"
#include "cute_kernels/attention/decode/fp8_warps_join.hpp"
#include "cute_kernels/attention/decode/fp8_warps_operands.hpp"
#include "cute_kernels/attention/decode/ring_stage.hpp"
#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/attention/decode/softmax.hpp"
#include "cute_kernels/sm90/mbarrier.hpp"
#include "cute_kernels/sm90/uniform.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// The consumers of a cache of 8 bits: each warp for itself computes softmax(scale Q K^T) V of 16
/// rows of a part, of its slices of their keys, not divided by the row sums; a row of O is a
/// multiple of unit_of_output_ until the warps' are added up. No warp waits for
/// another one but at a part's end. That no phase of a full barrier is taken for the one before
/// holds as copies land in order: when a block's turn comes, its warp knows of a later one than was
/// in its stage before, of its own or where warps have met at the end of the part before.
template <class Traits>
class Fp8WarpsMainloop {
  using SharedStorage = typename Traits::SharedStorage;
  using Stage = RingStage<Traits::kStages>;
  using Walk = WorkWalk<Traits>;
  using Part = typename Traits::Part;
  using FewKeysPart = typename Traits::FewKeysPart;
  using Operands = Fp8WarpsOperands<Traits>;

  static constexpr int kRows = 2;  // of a thread
  static constexpr int kRowsApart = 8;

 public:
  using Softmax = RunningSoftmax<kRows>;

  CUTLASS_DEVICE Fp8WarpsMainloop(CachedCall const& call, CacheSource const& source,
                                  ScoreUnits const& units, EightBits const& format,
                                  SharedStorage& shared)
      : call_(call),
        source_(source),
        units_(units),
        format_(format),
        scales_(call, source, format),
        shared_(shared) {}

  /// Of the consumers.
  CUTLASS_DEVICE static int warp() {
    return cutlass::canonical_warp_idx_sync() - cutlass::NumWarpsPerWarpGroup;
  }

  /// O of a part without keys.
  CUTLASS_DEVICE static auto empty_output() {
    auto out = cute::make_tensor<float>(typename Operands::LayoutOutput{});
    cute::clear(out);
    return out;
  }

  template <class Output>
  CUTLASS_DEVICE void compute(Walk const& walk, Softmax& softmax, Output& out) {
    int const blocks = sm90::uniform(walk.end_block() - walk.begin_block());
    Part const part = part_of(walk);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) unit_of_output_[row] = 1.f;
    if (blocks > 0) scales_.load_queries(walk, part, shared_);
    Fp8WarpsJoin<Traits>::meet();  // queries are there, and no one reads O of the part before
    // Of such a part each warp has the same rows, and the same number among those that share keys.
    bool const is_few =
        sm90::uniform(walk.tile().rows) <= kRowsApart && blocks <= Traits::kFewBlocks;
    if ((is_few ? FewKeysPart::block(part.slice) : Part::block(part.slice)) < blocks) {
      scales_.begin(walk, part.first_row / Part::kRows, part.first_row, row_of_warp(), shared_);
      format_.is_int8 ? compute_part<true>(walk, part, blocks, is_few, softmax, out)
                      : compute_part<false>(walk, part, blocks, is_few, softmax, out);
    }
    passed_ += blocks;
  }

  /// Hands over what compute() has made of a part: results(rows, place) of columns of O of which
  /// this warp then has all keys, and of their place in the tile.
  template <class Output, class Results>
  CUTLASS_DEVICE void finish(Walk const& walk, Softmax& softmax, Output& out,
                             Results const& results) const {
    Part const part = part_of(walk);
    AccumulatorPlace const place{part.first_row + row_of_warp(), Operands::first_output_column()};
    Fp8WarpsJoin<Traits>(part, warp(), walk.tile().rows, shared_)
        .join(softmax, unit_of_output_, out, place, results);
  }

 private:
  CUTLASS_DEVICE static Part part_of(Walk const& walk) {
    return Part(sm90::uniform(walk.tile().rows), warp());
  }
  CUTLASS_DEVICE static int row_of_warp() { return threadIdx.x % Traits::kLanes / 4; }

  template <bool kInt8, class Output>
  CUTLASS_DEVICE void compute_part(Walk const& walk, Part const& part, int blocks, bool is_few,
                                   Softmax& softmax, Output& out) {
    if (is_few) {
      FewKeysPart const few(kRowsApart, warp());
      compute_rows<kInt8, 1>(walk, few, blocks, softmax, out);
    } else if (sm90::uniform(walk.tile().rows) - part.first_row > kRowsApart) {
      compute_rows<kInt8, 2>(walk, part, blocks, softmax, out);
    } else {
      compute_rows<kInt8, 1>(walk, part, blocks, softmax, out);
    }
  }

  /// Of kOwnRows of each thread's rows; others are none of the tile's.
  template <bool kInt8, int kOwnRows, class Part, class Output>
  CUTLASS_DEVICE void compute_rows(Walk const& walk, Part const& part, int blocks, Softmax& softmax,
                                   Output& out) {
    using namespace cute;
    using Operands = Fp8WarpsOperands<Traits, Part::kKeys>;
    constexpr int kKeys = Part::kKeys;
    constexpr bool kFew = std::is_same_v<Part, FewKeysPart>;
    int const slices = blocks * Part::kSlices;
    auto scores = make_tensor<float>(typename Operands::LayoutScores{});
    auto score_rows = Operands::template score_rows<kOwnRows>(scores);
    auto out_rows = Operands::template output_rows<kOwnRows>(out);
    SeenKeys<Traits, kKeys> const seen(call_, source_.group, walk, part.first_row + row_of_warp());
    int const first_slice = sm90::uniform(walk.begin_block()) * Part::kSlices;
    typename Operands::Queries const queries(Traits::queries(shared_, part.first_row));
    Stage stage = Stage::of(passed_ + Part::block(part.slice));
    float products[4] = {};  // what they begin with
    if constexpr (kInt8) Operands::begin_products(queries, products);

    CUTLASS_PRAGMA_NO_UNROLL
    for (int slice = part.slice; slice < slices; slice += part.step) {
      int const number = first_slice + slice;  // of the item
      int const row = slice % Part::kSlices * kKeys;
      int const column = row + first_accumulator_column();
      Operands const keys(shared_.k.data(), stage.index, row);
      Operands const values(shared_.v.data(), stage.index, row);
      bool const ends_block = part.ends_block(slice);

      sm90::wait_memory(shared_.k_full[stage.index], stage.phase);
      keys.template multiply_queries<kInt8>(queries, products, scores);
      scales_.apply_to_scores(score_rows, column, stage.index, shared_);
      if (ends_block) release(shared_.k_empty[stage.index], part.arrivals);
      if (units_.softcap > 0) cap_scores(units_, scores);
      seen.mask(score_rows, number);
      float factor[kRows];
      bool moves = softmax.update(score_rows, factor);

      sm90::wait_memory(shared_.v_full[stage.index], stage.phase);
      if (scales_.are_values_scaled()) {
        moves |= scales_.apply_to_probabilities(score_rows, column, stage.index, shared_, factor,
                                                seen.are_alike(number));
      }
      if (kFew && slice == part.slice) moves = false;  // O is 0
      if (moves) Softmax::scale_rows(out_rows, factor);
      if (!kInt8 && !seen.are_alike(number) && values.has_nan()) {
        add_nan(seen, values, walk.tile().keys.begin + number * kKeys, out_rows);
        values.template add_values<kInt8, true, kOwnRows>(scores, out);
      } else {
        values.template add_values<kInt8, false, kOwnRows>(scores, out);
      }
      if (ends_block) {
        release(shared_.v_empty[stage.index], part.arrivals);
        stage.advance(Part::block(slice + part.step) - Part::block(slice));
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      unit_of_output_[row] = scales_.unit_of_output(row, shared_.value_unit);
    }
    softmax.reduce_sums();
  }

  /// The arrivals of a warp, behind the reads of all its lanes.
  CUTLASS_DEVICE static void release(cutlass::arch::ClusterBarrier const& barrier, int count) {
    __syncwarp();
    if (cute::elect_one_sync()) sm90::arrive(barrier, count);
  }

  /// Keeps NaN of V out of rows that do not see it: where P is 0, P V would still be NaN. It is
  /// left out there, and here added to the rows that do see it. `key`: the slice's first.
  template <class Seen, class Values, class Rows>
  CUTLASS_DEVICE static void add_nan(Seen const& seen, Values const& values, int key, Rows& out) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = 0; i < Values::kKeys; ++i) {
      constexpr int kOwnRows = decltype(cute::size<0>(out))::value;
      bool sees[kOwnRows];
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kOwnRows; ++row) sees[row] = seen.is_seen(row, key + i);
      CUTLASS_PRAGMA_UNROLL
      for (int chunk = 0; chunk < Traits::kChunks; ++chunk) {
        uint32_t const nan = values.nan_of(i, chunk);
        if (nan == 0) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) {
          CUTLASS_PRAGMA_UNROLL
          for (int row = 0; row < kOwnRows; ++row) {
            if (sees[row] && (nan >> 8 * j & 1) != 0) out(row, 4 * chunk + j) = NAN;
          }
        }
      }
    }
  }

  CachedCall const& call_;
  CacheSource const& source_;
  ScoreUnits units_;
  EightBits const& format_;
  Fp8Scales<Traits> scales_;
  SharedStorage& shared_;
  uint32_t passed_ = 0;          // blocks of the parts so far
  float unit_of_output_[kRows];  // of the part
};

}  // namespace cute_kernels::attention
