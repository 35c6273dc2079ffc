#pragma once

#include <cutlass/arch/memory_sm80.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/fp8_traits.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/opaque.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// What becomes of a tile's sums of P V, and what that needs beside them.
template <class Traits>
class Fp8Result {
  using SharedStorage = typename Traits::SharedStorage;

 public:
  /// Adds a block's P V to O, slice by slice, and its row sums to the softmax's.
  template <class Probabilities, class Softmax, class Output>
  CUTLASS_DEVICE static void add_slices(SharedStorage& shared, int stage,
                                        Probabilities const& probabilities, Softmax& softmax,
                                        Output& out) {
    using namespace cute;
    for_each(make_seq<Traits::kSlices>{}, [&](auto slice) {
      using Mma = typename Traits::template SliceMma<slice>;
      constexpr int kChannels = tile_size<1>(Mma{});
      constexpr int kFirst = slice * Traits::kSliceChannels;
      auto values =
          make_tensor(make_smem_ptr(shared.v.data() +
                                    (stage * Traits::kValueChannels + kFirst) * Traits::kTileN),
                      typename Traits::template LayoutSlice<kChannels>{});
      auto thread_mma = Mma{}.get_thread_slice(threadIdx.x % cutlass::NumThreadsPerWarpGroup);
      auto operand = thread_mma.make_fragment_B(thread_mma.partition_B(values));
      auto sums = partition_fragment_C(Mma{}, Shape<Int<Traits::kWarpgroupM>, Int<kChannels>>{});
      sm90::issue_gemm<sm90::Accumulate::kNo>(Mma{}, probabilities, operand, sums);
      warpgroup_wait<0>();
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Traits::kSliceChannels / 2; ++i) out(kFirst / 2 + i) += sums(i);
      if constexpr (kChannels > Traits::kSliceChannels) {
        CUTLASS_PRAGMA_UNROLL
        for (int row = 0; row < 2; ++row) {
          softmax.add_sum(row, sums(Traits::kSliceChannels / 2 + 2 * row));
        }
      }
    });
  }

  /// Takes a block's row sums from the channels of ones. Not left there for the next block: 8-bit
  /// WGMMAs add up in about 14 bits and cut off the rest, a third of the sum after 16k keys.
  template <class Output, class Softmax>
  CUTLASS_DEVICE static void take_sums(Output& out, Softmax& softmax) {
    if constexpr (Traits::kLinearExp) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < 2; ++row) {
        float& sum = out(Traits::kHeadDimV / 2 + 2 * row);  // a column pair a row
        softmax.add_sum(row, sum);
        sum = 0.f;
      }
    }
  }

  /// The thread's part of O as the accumulator of a product without the channels of ones.
  template <class Output>
  CUTLASS_DEVICE static auto without_ones(Output& out) {
    using namespace cute;
    using Mma = typename Traits::MmaOut;
    auto layout =
        partition_fragment_C(Mma{}, Shape<Int<Traits::kWarpgroupM>, Int<Traits::kHeadDimV>>{})
            .layout();
    return make_tensor(out.data(), layout);
  }

  /// What the thread's rows are told of their scores, and K does not have.
  template <class Params, class Softmax>
  CUTLASS_DEVICE static void add_score_offsets(Params const& params,
                                               typename Params::Tile const& coord, int warpgroup,
                                               Softmax& softmax) {
    if (params.score_offset == nullptr) return;
    int const thread = opaque_thread();
    int const query = params.first_query(coord) + warpgroup * Traits::kWarpgroupM +
                      thread / 32 * 16 + thread % 32 / 4;
    int const seqlen_q = params.mask_of(coord).seqlen_q;
    float const* const offsets =
        params.score_offset +
        (static_cast<int64_t>(params.batch(coord)) * params.heads + coord.head) *
            cute::get<0>(params.shape_q) +
        params.row_q(coord);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < 2; ++row) {
      int const own = query + 8 * row;
      if (own >= 0 && own < seqlen_q) softmax.add_offset(row, offsets[own]);
    }
  }

  /// Starts to copy V's scales to shared memory, long before they are needed.
  template <class Params>
  CUTLASS_DEVICE static void load_value_scales(Params const& params, SharedStorage& shared,
                                               typename Params::Tile const& coord, int warpgroup) {
    float const* const scales = params.v_scale.data +
                                params.entry(coord) * params.v_scale.batch_stride +
                                params.heads_per_kv.div(coord.head) * params.v_scale.head_stride;
    // Nobody has made scales of no keys.
    bool const has_keys = !Traits::kAnyCall || params.mask_of(coord).seqlen_k > 0;
    for (int channel = opaque_thread(); channel < Traits::kHeadDimV;
         channel += cutlass::NumThreadsPerWarpGroup) {
      bool const is_there = channel < params.head_dim_v && has_keys;
      cutlass::arch::cp_async_zfill<sizeof(float)>(
          &shared.v_scale[warpgroup][channel],
          scales + (is_there ? channel * params.v_scale.stride : 0), is_there);
    }
  }

  /// Multiplies the columns of the thread's part of O by V's scales.
  template <class Output>
  CUTLASS_DEVICE static void scale_values(SharedStorage& shared, int warpgroup, Output& out) {
    using namespace cute;
    cutlass::arch::cp_async_wait<0>();
    sm90::barrier_sync(sm90::NamedBarrier::kOutputReady, warpgroup,
                       cutlass::NumThreadsPerWarpGroup);
    float const* const scales = shared.v_scale[warpgroup].data() + opaque_thread() % 4 * 2;
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < size<1>(out); col += 2) {
      float2 const pair = *reinterpret_cast<float2 const*>(scales + 4 * col);
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < size<0>(out); ++row) {
        out(row, col) *= pair.x;
        out(row, col + 1) *= pair.y;
      }
    }
  }

  /// O in 16 bits. Both types share a kernel: what moves the result afterwards only moves bits.
  template <class Params, class Output>
  CUTLASS_DEVICE static auto round_output(Params const& params, Output const& out) {
    using namespace cute;
    auto rounded = make_tensor<typename Traits::Output>(out.layout());
    if (params.out_float16) {
      auto half = recast<cutlass::half_t>(rounded);
      sm90::convert_fragment<cutlass::half_t>(out, half);
    } else {
      sm90::convert_fragment<typename Traits::Output>(out, rounded);
    }
    return rounded;
  }

  /// The thread's number in its warpgroup. What is computed from it once a tile shall not stay in
  /// registers from tile to tile.
  CUTLASS_DEVICE static int opaque_thread() {
    return sm90::opaque(threadIdx.x % cutlass::NumThreadsPerWarpGroup);
  }
};

}  // namespace cute_kernels::attention
