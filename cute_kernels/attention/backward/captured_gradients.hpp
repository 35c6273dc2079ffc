#pragma once

#include <cstdint>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/key_blocks.hpp"
#include "cute_kernels/attention/variant/place.hpp"

namespace cute_kernels::attention {

/// What a key block adds to the gradients of captured tensors, in fp32, each number of it written
/// by one thread, so that sums of them have one order. With S the changed score, a tensor t has
/// dL/dt = sum of P (dP - delta) dS/dt:
/// - Gradient::kOfHeads: (batch, heads, key blocks, warps), of packed sequences (1, heads, numbers
///   of key blocks, warps), where a warp's sum over its keys and all queries stands;
/// - Gradient::kOfScores: (batch, heads, seqlen_q, seqlen_k), each score's own, of dense calls.
/// Zero where nobody writes.
template <class Traits>
class CapturedGradients {
  using Variant = typename Traits::Variant;
  static constexpr int kCount = Variant::kGradients;

 public:
  /// Of a step: `gradients` are dP - delta, of which the thread's first is at `key` and `query`.
  template <class Params, class Rows, class Probabilities>
  CUTLASS_DEVICE void add(Params const& params, Rows const& gradients, SequencePlace const& places,
                          int key, int query, Probabilities const& probabilities) {
    using namespace cute;
    int const seqlen_q = places.sequence.seqlen_q, seqlen_k = places.sequence.seqlen_k;
    for_each(make_seq<kCount>{}, [&](auto i) {
      auto p = make_tensor(probabilities.of_captured[i].data(), gradients.layout());
      int64_t const head = static_cast<int64_t>(places.batch) * params.heads + places.head;
      float* const first = params.variant.gradients[i] + (head * seqlen_q + query) * seqlen_k + key;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(gradients); ++col) {
        int const further = 8 * (col / 2) + col % 2;
        CUTLASS_PRAGMA_UNROLL
        for (int row = 0; row < size<0>(gradients); ++row) {
          float const gradient = gradients(row, col) * static_cast<float>(p(row, col));
          if constexpr (Variant::template kKind<i> == Gradient::kOfHeads) {
            sums_[i] += gradient;
          } else if (query + further < seqlen_q && key + 8 * row < seqlen_k) {
            first[int64_t{further} * seqlen_k + 8 * row] = gradient;
          }
        }
      }
    });
  }

  /// When the key block's last step of a head is done. Of a whole warp, number `warp` of its CTA.
  template <class Params>
  CUTLASS_DEVICE void finish_head(Params const& params, typename Traits::KeyBlock const& coord,
                                  SequencePlace const& places, int warp) {
    bool const packed = params.variant.cu_seqlens_k != nullptr;
    int const block = packed
                          ? coord.sequence.k.first / Traits::kTileN + places.batch + coord.n_block
                          : coord.n_block;
    int64_t const row =
        static_cast<int64_t>(packed ? 0 : places.batch) * params.heads + places.head;
    int64_t const at = (row * params.clusters + block) * Traits::kConsumerWarps + warp;
    cute::for_each(cute::make_seq<kCount>{}, [&](auto i) {
      if constexpr (Variant::template kKind<i> == Gradient::kOfHeads) {
        CUTLASS_PRAGMA_UNROLL
        for (int lanes = cutlass::NumThreadsPerWarp / 2; lanes > 0; lanes /= 2) {
          sums_[i] += __shfl_xor_sync(0xffffffff, sums_[i], lanes);
        }
        if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
          params.variant.gradients[i][at] = sums_[i];
        }
        sums_[i] = 0.f;
      }
    });
  }

 private:
  float sums_[kCount == 0 ? 1 : kCount] = {};
};

}  // namespace cute_kernels::attention
