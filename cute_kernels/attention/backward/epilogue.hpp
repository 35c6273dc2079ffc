#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/key_blocks.hpp"
#include "cute_kernels/attention/global_tensor.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

namespace cute_kernels::attention {

/// The way of dK and dV, 64 keys at a time: rounded to shared memory, and by TMA, which clips rows
/// and columns outside the tensors, to global memory. As floats they go there straight away.
template <class Traits>
class BackwardEpilogue {
  using Element = typename Traits::Element;

  template <int kChannels>
  using Layout = typename Traits::template LayoutOfRows<Traits::kWarpgroupN, kChannels>;

 public:
  /// What a warpgroup adds up the gradient of 64 keys in, of so many channels.
  template <int kChannels>
  CUTLASS_DEVICE static auto new_gradient() {
    using namespace cute;
    auto gradient = partition_fragment_C(typename Traits::template MmaOfGradient<kChannels>{},
                                         Shape<Int<Traits::kWarpgroupN>, Int<kChannels>>{});
    clear(gradient);
    return gradient;
  }

  /// Of a whole warpgroup: its 64 keys' gradient, times `factor`.
  template <int kChannels, class Accumulator>
  CUTLASS_DEVICE static void write(Element* buffer, Accumulator& gradient, float factor = 1.f) {
    using namespace cute;
    using Mma = typename Traits::template MmaOfGradient<kChannels>;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(gradient); ++i) gradient(i) *= factor;
    auto rounded = make_tensor<Element>(gradient.layout());
    sm90::convert_fragment<Element>(gradient, rounded);
    auto tile = make_tensor(make_smem_ptr(buffer), Layout<kChannels>{});
    auto tiled_copy = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, Mma{});
    auto slice = tiled_copy.get_thread_slice(threadIdx.x % cutlass::NumThreadsPerWarpGroup);
    copy(tiled_copy, slice.retile_S(rounded), slice.partition_D(tile));
  }

  /// What write() does, or where floats are asked for, all there is to do. `part` counts the 64
  /// keys within the key block.
  template <int kChannels, class Params, class Accumulator>
  CUTLASS_DEVICE static void hand_out(Params const& params, TensorView const& grad, int channels,
                                      typename Traits::KeyBlock const& coord, int part,
                                      Element* buffer, Accumulator& gradient, float factor = 1.f) {
    if (params.float_grads) {
      store_floats(params, grad, channels, coord, part, gradient, factor);
    } else {
      write<kChannels>(buffer, gradient, factor);
    }
  }

  /// Of one thread: starts the TMA store of what write() has written, once that can be seen.
  /// `part` counts the 64 keys within the key block.
  template <int kChannels, class Tma, class Params>
  CUTLASS_DEVICE static void store(Tma const& tma, Params const& params, Element const* buffer,
                                   typename Traits::KeyBlock const& coord, int part) {
    using namespace cute;
    constexpr int kParts = Traits::kTileN / Traits::kWarpgroupN;
    auto keys = local_tile(rows_of_head(tma, params.shape_k, coord.kv_head, coord.tma_grad_k()),
                           Shape<Int<Traits::kWarpgroupN>, Int<kChannels>>{},
                           make_coord(coord.n_block * kParts + part, _0{}));
    auto tile = make_tensor(make_smem_ptr(buffer), Layout<kChannels>{});
    auto slice = tma.get_slice(_0{});
    copy(tma, slice.partition_S(tile), slice.partition_D(keys));
  }

 private:
  /// Four lanes have eight neighbouring channels of a key: whole sectors of 32 bytes.
  template <class Params, class Accumulator>
  CUTLASS_DEVICE static void store_floats(Params const& params, TensorView const& grad,
                                          int channels, typename Traits::KeyBlock const& coord,
                                          int part, Accumulator const& gradient, float factor) {
    using namespace cute;
    int const thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    int const first_key = coord.n_block * Traits::kTileN + part * Traits::kWarpgroupN +
                          thread / 32 * 16 + thread % 32 / 4;
    int const column = thread % 4 * 2;
    auto values = make_tensor(gradient.data(), sm90::accumulator_rows_cols(gradient.layout()));
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(values); ++row) {
      int const key = first_key + 8 * row;
      if (key >= coord.rows_of_k(params)) continue;
      float* const to = static_cast<float*>(grad.data) + coord.first_of_k(grad) +
                        coord.kv_head * grad.head_stride + key * grad.seqlen_stride + column;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(values); col += 2) {
        if (4 * col + column >= channels) continue;
        *reinterpret_cast<float2*>(to + 4 * col) =
            make_float2(values(row, col) * factor, values(row, col + 1) * factor);
      }
    }
  }
};

}  // namespace cute_kernels::attention
