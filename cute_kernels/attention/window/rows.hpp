#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/window/params.hpp"

namespace cute_kernels::attention {

/// Which rows of every tile a warp has, 16 that follow one another, and of these a thread two, 8
/// apart. Queries are counted from the tile's first, heads from the group's.
struct WindowRows {
  static constexpr int kOfWarp = 16;
  static constexpr int kOfThread = 2;
  static constexpr int kApart = 8;

  int first;  // query of the warp
  int last;
  int first_head;  // of the first row
  int query[kOfThread];
  int head[kOfThread];

  CUTLASS_DEVICE WindowRows(WindowParams const& params, int first_row, int lane)
      : first(first_row >> params.group_log2),
        last((first_row + kOfWarp - 1) >> params.group_log2),
        first_head(first_row & (params.group - 1)) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kOfThread; ++i) {
      int const row = first_row + lane / 4 + kApart * i;
      query[i] = row >> params.group_log2;
      head[i] = row & (params.group - 1);
    }
  }

  /// -inf where there is none.
  CUTLASS_DEVICE float sink(WindowParams const& params, SeenTile const& tile, int i) const {
    if (params.sinks == nullptr) return -INFINITY;
    float const* const of_group = params.sinks + tile.head_kv * params.group;
    return __ldg(of_group + head[i]);
  }

  /// Of a row.
  CUTLASS_DEVICE float& lse(WindowParams const& params, SeenTile const& tile, int i) const {
    int const first_head = tile.batch * params.heads_q + tile.head_kv * params.group;
    float* const of_group = params.lse + int64_t{first_head} * params.rows + tile.row;
    return of_group[head[i] * params.rows + query[i]];  // below 2^30: fits_window
  }
};

}  // namespace cute_kernels::attention
