#pragma once

#include <cuda_bf16.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/fp8_result.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"

namespace cute_kernels::attention {

/// Sums of P V over more blocks than the tensor cores' accumulators may add up: these cut every
/// product off at about 14 bits of what they hold, of which long sums of one sign are lost.
///
/// Every kPromoteEvery blocks the thread's accumulators are added to sums that stand in the memory
/// that O passes through at the tile's end. That is as wide as 16 bits an element, so what stands
/// there is the sum rounded to bf16, and the accumulators go on from what rounding has left: small,
/// and nothing is lost. Each thread reads its own words alone.
template <class Traits>
class Fp8Sums {
  using SharedStorage = typename Traits::SharedStorage;
  static constexpr int kEvery = Traits::kPromoteEvery;
  static constexpr int kRows = 2;
  static constexpr int kVectors = Traits::kHeadDimV / 2 / 8;       // of a thread, 16 bytes each
  static constexpr int kStride = cutlass::NumThreadsPerWarpGroup;  // of vectors

 public:
  CUTLASS_DEVICE Fp8Sums(SharedStorage& shared, int warpgroup)
      : shared_(shared), warpgroup_(warpgroup) {}

  /// The accumulators' rows were multiplied by these; what stands in memory is when it is read.
  CUTLASS_DEVICE void rescale(float const (&factors)[kRows]) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) factor_[row] *= factors[row];
  }

  /// Counts a block that the accumulators have, and takes them out when it is time.
  template <class Output>
  CUTLASS_DEVICE void count_block(Output& out) {
    ++blocks_;
    if (blocks_ % kEvery != 0) return;
    if (blocks_ == kEvery) {
      wait_for_memory();
    } else {
      add(out);
    }
    leave_remainders(out);
  }

  /// Adds what stands in memory to the accumulators: O in fp32.
  template <class Output>
  CUTLASS_DEVICE void add_to(Output& out) const {
    if (blocks_ >= kEvery) add(out);
  }

 private:
  template <class Output>
  CUTLASS_DEVICE void add(Output& out) const {
    uint4 const* const vectors = own_vectors();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      uint4 const sums = vectors[i * kStride];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 4; ++j) {  // pairs of elements, of the two rows in turn
        uint32_t const word = reinterpret_cast<uint32_t const*>(&sums)[j];
        float& low = out(8 * i + 2 * j);
        float& high = out(8 * i + 2 * j + 1);
        low = fmaf(low_half(word), factor_[j % kRows], low);
        high = fmaf(high_half(word), factor_[j % kRows], high);
      }
    }
  }

  /// Writes the accumulators to memory, rounded, and leaves in them what rounding has cut off.
  template <class Output>
  CUTLASS_DEVICE void leave_remainders(Output& out) {
    uint4* const vectors = own_vectors();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      uint4 rounded;
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& low = out(8 * i + 2 * j);
        float& high = out(8 * i + 2 * j + 1);
        auto const pair = __floats2bfloat162_rn(low, high);
        uint32_t const word = reinterpret_cast<uint32_t const&>(pair);
        low -= low_half(word);
        high -= high_half(word);
        reinterpret_cast<uint32_t*>(&rounded)[j] = word;
      }
      vectors[i * kStride] = rounded;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) factor_[row] = 1.f;
  }

  CUTLASS_DEVICE static float low_half(uint32_t word) { return __uint_as_float(word << 16); }

  /// With the low half behind its bits, which spares a mask: the same number whenever it is read.
  CUTLASS_DEVICE static float high_half(uint32_t word) { return __uint_as_float(word); }

  /// TMA has read the tile before.
  CUTLASS_DEVICE void wait_for_memory() const {
    if (threadIdx.x % cutlass::NumThreadsPerWarpGroup == 0) cute::tma_store_wait<0>();
    sm90::barrier_sync_memory(sm90::NamedBarrier::kOutputReady, warpgroup_,
                              cutlass::NumThreadsPerWarpGroup);
  }

  CUTLASS_DEVICE uint4* own_vectors() const {
    return reinterpret_cast<uint4*>(shared_.o[warpgroup_].data()) +
           Fp8Result<Traits>::opaque_thread();
  }

  SharedStorage& shared_;
  int warpgroup_;
  int blocks_ = 0;
  float factor_[kRows] = {1.f, 1.f};
};

}  // namespace cute_kernels::attention
