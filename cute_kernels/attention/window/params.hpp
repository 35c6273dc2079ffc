#pragma once

#include <cutlass/fast_math.h>
#include <cute/arch/copy_sm90_desc.hpp>

#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/window/plan.hpp"

namespace cute_kernels::attention {

/// What a kernel for short windows is told at run time. Tensors are (channels, heads, rows, batch)
/// to TMA.
struct WindowParams {
  cute::TmaDescriptor tma_q;  // boxes of a tile's rows
  cute::TmaDescriptor tma_k;  // boxes of a tile's keys
  cute::TmaDescriptor tma_v;
  cute::TmaDescriptor tma_o;  // boxes of a warp's rows
  int const* count;           // of the list's tiles
  WorkTile const* tiles;
  cutlass::FastDivmod heads_kv;
  WindowKeys keys;
  int tile_bytes;  // that TMA brings of K and V
  int group;
  int group_log2;
  int heads_q;
  int rows;  // of Q
  int head_dim_v;
  float scale_log2;
  float const* sinks;  // (heads_q), or null
  float* lse;          // (batch, heads_q, rows)
  TensorView v;
  TensorView out;

  CUTLASS_DEVICE void prefetch_descriptors() const {
    cute::prefetch_tma_descriptor(&tma_q);
    cute::prefetch_tma_descriptor(&tma_k);
    cute::prefetch_tma_descriptor(&tma_v);
    cute::prefetch_tma_descriptor(&tma_o);
  }
};

/// A CTA's tiles of one key head: entries of the list, each with all key heads in turn.
class WindowTiles {
 public:
  CUTLASS_DEVICE explicit WindowTiles(WindowParams const& params)
      : params_(params), place_(blockIdx.x), end_(*params.count * params.heads_kv.divisor) {}

  CUTLASS_DEVICE bool valid() const { return place_ < end_; }
  CUTLASS_DEVICE int count() const {
    return valid() ? (end_ - 1 - place_) / static_cast<int>(gridDim.x) + 1 : 0;
  }
  CUTLASS_DEVICE void advance() { place_ += gridDim.x; }

  struct Place {
    WorkTile tile;
    int head_kv;
  };
  CUTLASS_DEVICE Place place() const {
    int entry, head;
    params_.heads_kv(entry, head, place_);
    return {params_.tiles[entry], head};
  }

 private:
  WindowParams const& params_;
  int place_;
  int end_;
};

}  // namespace cute_kernels::attention
