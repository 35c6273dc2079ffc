#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/decode/ring_stage.hpp"
#include "cute_kernels/attention/decode/seen_keys.hpp"
#include "cute_kernels/attention/decode/softmax.hpp"
#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/sm90/mbarrier.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// The end of a part of whose blocks two consumer warpgroups had every other one: each of them adds
/// up one half of O's columns. The other half it hands over through the stage of V that it has read
/// last, which the reader then frees.
template <class Traits>
class TurnsEnd {
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;

  static constexpr int kRows = 2;
  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup;
  static constexpr int kAllThreads = 2 * kThreads;
  static constexpr int kVector = 4;  // floats of 16 bytes
  // Floats of a thread: of half of O, and at a time.
  static constexpr int kHalf = Traits::kWarpgroupM * Traits::kHeadDim / 2 / kThreads;
  static constexpr int kStageBytes = Traits::kStageElements * sizeof(typename Traits::Element);
  static constexpr int kInStage = kStageBytes / int{sizeof(float)} / kThreads;
  static constexpr int kAtOnce = kHalf < kInStage ? kHalf : kInStage;
  static_assert(Traits::kConsumers == 2 && kHalf % kAtOnce == 0 && kAtOnce % kVector == 0);

 public:
  /// `passed`: the number of blocks up to the part's end, of all that the CTA has come to.
  CUTLASS_DEVICE TurnsEnd(Walk const& walk, int warpgroup, uint32_t passed, SharedStorage& shared)
      : rows_(walk.tile().rows),
        blocks_(walk.end_block() - walk.begin_block()),
        warpgroup_(warpgroup),
        passed_(passed),
        shared_(shared) {}

  /// This warpgroup's half of the columns, of all blocks; the softmax becomes that of all.
  template <class Softmax, class Output>
  CUTLASS_DEVICE auto join(Softmax& softmax, Output const& out) const {
    using namespace cute;
    static_assert(decltype(size(out))::value == 2 * kHalf);
    auto half = make_tensor<float>(Shape<Shape<_2, _2, Int<kHalf / 4>>, _1, _1>{});
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kHalf; ++i) half(i) = warpgroup_ == 0 ? out(i) : out(kHalf + i);
    if (blocks_ == 0) return half;

    bool const hands_over = blocks_ > warpgroup_;
    bool const is_handed = blocks_ > other();
    bool const has_rows = first_row_of_warp() < rows_;
    float own[kRows], others[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kHalf; first += kAtOnce) {
      // All warps have read what is overwritten now: V, or what was handed over before.
      meet();
      if (hands_over && has_rows) {
        if (first == 0) write_statistics(softmax);
        float4* const to = handed_by(warpgroup_);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; i += kVector) {
          auto x = [&](int j) {
            return warpgroup_ == 0 ? out(kHalf + first + i + j) : out(first + i + j);
          };
          to[i / kVector * kThreads] = {x(0), x(1), x(2), x(3)};
        }
      }
      meet();
      if (is_handed && has_rows) {
        if (first == 0) join_statistics(softmax, own, others);
        float4 const* const from = handed_by(other());
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; i += kVector) {
          float4 const x = from[i / kVector * kThreads];
          auto add = [&](int j, float value) {
            // Pairs of columns, of one row and of the other.
            float& sum = half(first + i + j);
            sum = sum * own[j / 2] + value * others[j / 2];
          };
          add(0, x.x), add(1, x.y), add(2, x.z), add(3, x.w);
        }
      }
    }
    if (is_handed && elect_one_sync()) {
      sm90::arrive(shared_.v_empty[last_stage(other())], Traits::kConsumers);
    }
    return half;
  }

 private:
  CUTLASS_DEVICE static void meet() {
    sm90::barrier_sync_memory(sm90::NamedBarrier::kTurnsEnded, 0, kAllThreads);
  }
  CUTLASS_DEVICE int other() const { return 1 - warpgroup_; }
  CUTLASS_DEVICE static int thread() { return threadIdx.x % kThreads; }
  CUTLASS_DEVICE static int first_row_of_warp() { return thread() / 32 * 16; }
  CUTLASS_DEVICE static int row(int i) { return first_accumulator_row() + 8 * i; }

  /// The stage of a warpgroup's last block.
  CUTLASS_DEVICE int last_stage(int warpgroup) const {
    uint32_t const behind = (blocks_ - 1 - warpgroup) % 2;  // the part's last one is the other's
    return RingStage<Traits::kStages>::of(passed_ - 1 - behind).index;
  }
  CUTLASS_DEVICE float4* handed_by(int warpgroup) const {
    auto* const stage = shared_.v.data() + last_stage(warpgroup) * Traits::kStageElements;
    return reinterpret_cast<float4*>(stage) + thread();
  }

  template <class Softmax>
  CUTLASS_DEVICE void write_statistics(Softmax const& softmax) const {
    if (thread() % 4 != 0) return;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      shared_.statistics[warpgroup_][row(i)] = softmax.statistics(i);
    }
  }
  template <class Softmax>
  CUTLASS_DEVICE void join_statistics(Softmax& softmax, float (&own)[kRows],
                                      float (&others)[kRows]) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      softmax.join(i, shared_.statistics[other()][row(i)], own[i], others[i]);
    }
  }

  int rows_;
  int blocks_;
  int warpgroup_;
  uint32_t passed_;
  SharedStorage& shared_;
};

}  // namespace cute_kernels::attention
