#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/window/params.hpp"
#include "cute_kernels/sm90/finite.hpp"
#include "cute_kernels/sm90/math.hpp"

namespace cute_kernels::attention {

/// Computes again what of O is not finite: NaN and infinities of V may have come from keys that the
/// row does not see, whose P is 0. Slowly, from global memory, of keys that it does see alone; such
/// a value of V goes into the result whatever its P is.
template <class Traits>
class WindowRepair {
  using Element = typename Traits::Element;
  static constexpr int kLanes = 32;
  static constexpr int kVector = 8;
  static_assert(Traits::kHeadDimV == 2 * kLanes, "a lane has two channels of O");

 public:
  /// Of the CTA's tiles, by warp `warp` of `warps`. What they stored must be visible.
  CUTLASS_DEVICE static void repair(WindowParams const& params, int warp, int warps) {
    for (WindowTiles tiles(params); tiles.valid(); tiles.advance()) {
      auto const [tile, head_kv] = tiles.place();
      WindowRanges ranges = tile.ranges();
      ranges.seqlen_q >>= params.group_log2;
      int const end = min(tile.first_row + Traits::kTileRows, tile.sequence.seqlen_q);
      CUTLASS_PRAGMA_NO_UNROLL
      for (int row = tile.first_row + warp; row < end; row += warps) {
        int const query = row >> params.group_log2;
        int const head = head_kv * params.group + (row & (params.group - 1));
        repair_row(params, tile.sequence, ranges, query, head, head_kv);
      }
    }
  }

 private:
  CUTLASS_DEVICE static void repair_row(WindowParams const& params, Sequence const& sequence,
                                        WindowRanges const& ranges, int query, int head,
                                        int head_kv) {
    int const lane = threadIdx.x % kLanes;
    bool const has_channels = 2 * lane < params.head_dim_v;
    Element* const out =
        rows_of<Element>(params.out, sequence.batch, head, sequence.row_q + query) + 2 * lane;
    bool const low_is_wrong = has_channels && !sm90::is_finite(out[0]);
    bool const high_is_wrong = has_channels && !sm90::is_finite(out[1]);
    if (!__any_sync(0xffffffff, low_is_wrong || high_is_wrong)) return;

    int const first = ranges.first_key(query), end = ranges.end_key(query);
    auto const* const q = rows_of<Element>(params.q, sequence.batch, head, sequence.row_q + query);
    auto score = [&](int key) {
      if (key >= end) return -INFINITY;
      auto const* const k =
          rows_of<Element>(params.k, sequence.batch, head_kv, sequence.row_k + key);
      float sum = 0.f;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int channel = 0; channel < params.head_dim; ++channel) {
        sum += static_cast<float>(q[channel]) * static_cast<float>(k[channel]);
      }
      return sum;
    };
    float most = -INFINITY;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int key = first; key < end; key += kLanes) most = fmaxf(most, score(key + lane));
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, lanes));
    }
    float const sink = params.sinks == nullptr ? -INFINITY : params.sinks[head];
    float const sink_above = sink * sm90::kLog2e - most * params.scale_log2;
    float sum = first < end ? exp2f(sink_above) : 1.f, low = 0.f, high = 0.f;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int key = first; key < end; key += kLanes) {
      float const p =
          key + lane < end ? exp2f((score(key + lane) - most) * params.scale_log2) : 0.f;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = 0; i < min(kLanes, end - key); ++i) {
        float const p_of_key = __shfl_sync(0xffffffff, p, i);
        sum += p_of_key;
        if (!has_channels) continue;
        auto const* const v =
            rows_of<Element>(params.v, sequence.batch, head_kv, sequence.row_k + key + i) +
            2 * lane;
        low +=
            sm90::is_finite(v[0]) ? p_of_key * static_cast<float>(v[0]) : static_cast<float>(v[0]);
        high +=
            sm90::is_finite(v[1]) ? p_of_key * static_cast<float>(v[1]) : static_cast<float>(v[1]);
      }
    }
    if (low_is_wrong) out[0] = static_cast<Element>(low / sum);
    if (high_is_wrong) out[1] = static_cast<Element>(high / sum);
  }
};

}  // namespace cute_kernels::attention
