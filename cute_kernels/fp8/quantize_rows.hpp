#pragma once

#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/fp8/row_block.hpp"

namespace cute_kernels::fp8 {

static_assert(kBlockRows == attention::kScaleRows);

/// All threads of a CTA.
struct CtaTeam {
  CUTLASS_DEVICE static int thread() { return threadIdx.x; }
  CUTLASS_DEVICE static void sync() { __syncthreads(); }
};

/// One CTA quantises a RowBlock: everything is read once, stays in registers, and is written once.
template <class In, class Out_, int kHeadDim_, int kRows, int kResidentThreads_ = 1024>
struct QuantizeRows {
  using Out = Out_;
  using Block = RowBlock<CtaTeam, In, Out, kHeadDim_, kRows>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = Block::kThreads;
  static constexpr int kResidentThreads = kResidentThreads_;

  struct SharedStorage {
    alignas(16) uint32_t signs[kHeadDim / 2];
    alignas(16) float shift[kHeadDim];
    uint32_t maximum[kThreads / 32];
  };

  QuantizeRowsProblem const& p;
  SharedStorage& shared;
  int const head = blockIdx.x;
  int const block = blockIdx.y;
  int const batch = blockIdx.z;

  /// What is the same for all rows, to shared memory. Whether the shift alone may be too large.
  CUTLASS_DEVICE bool prepare() const {
    static_assert(kThreads >= kHeadDim);
    int const i = threadIdx.x;
    bool is_huge = false;
    if (i < kHeadDim) {
      write_sign(shared.signs, p.transform, i);
      if (p.shift != nullptr) {
        int64_t const pair = static_cast<int64_t>(batch) * p.heads + head;
        float const shift = __ldcg(p.shift + pair * kHeadDim + i);
        uint32_t const sign = reinterpret_cast<uint16_t const*>(shared.signs)[i];
        shared.shift[i / 4 % 2 * (kHeadDim / 2) + i / 8 * 4 + i % 4] =
            __uint_as_float(__float_as_uint(shift) ^ sign << 16);
        is_huge = !(fabsf(shift) <= Block::kHarmless);
      }
    }
    return __syncthreads_or(is_huge);
  }

  CUTLASS_DEVICE void run() const {
    int64_t const pair = static_cast<int64_t>(batch) * p.heads + head;
    Block const rows(
        {}, static_cast<In const*>(p.in.data) + batch * p.in.batch_stride + head * p.in.head_stride,
        p.in.seqlen_stride, block * kBlockRows, p.seqlen, p.transform.incoherent,
        {shared.signs, p.shift == nullptr ? nullptr : shared.shift, shared.maximum});
    typename Block::Raw raw;
    rows.load(raw);  // all loads first: they are what the kernel's time is made of
    if (p.shift != nullptr) cudaGridDependencySynchronize();
    bool const is_shift_huge = prepare();
    typename Block::Values x;
    auto const [to_bytes, scale] = rows.transform(raw, x, is_shift_huge);
    if (threadIdx.x == 0) p.scale[pair * gridDim.y + block] = scale;
    int64_t const first_row = static_cast<int64_t>(batch) * p.seqlen + block * kBlockRows;
    Out* const out = static_cast<Out*>(p.out) + (first_row * p.heads + head) * kHeadDim;
    rows.template round<false>(x, to_bytes, [&](int row, int channel, uint2 bytes) {
      *reinterpret_cast<uint2*>(out + static_cast<int64_t>(row) * p.heads * kHeadDim + channel) =
          bytes;
    });
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kResidentThreads / Kernel::kThreads)
    quantize_rows_kernel(CUTE_GRID_CONSTANT QuantizeRowsProblem const p) {
  __shared__ typename Kernel::SharedStorage shared;
  cudaTriggerProgrammaticLaunchCompletion();
  Kernel{p, shared}.run();
  end_after_previous();
}

}  // namespace cute_kernels::fp8
