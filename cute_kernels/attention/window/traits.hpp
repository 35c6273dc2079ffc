#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include "cute_kernels/attention/forward/traits.hpp"
#include "cute_kernels/attention/window/plan.hpp"

namespace cute_kernels::attention {

/// As a forward kernel's, for P V.
template <class Tile>
struct WindowTile : Tile {
  static constexpr int kTileN = WindowKeys::values(Tile::kTileN);
};

/// Everything about a kernel for short windows that is known when it is compiled. A block has kKeys
/// keys, to P V kTileN.
template <class Tile>
struct WindowTraits : ForwardTraits<WindowTile<Tile>> {
  using Common = ForwardTraits<WindowTile<Tile>>;
  using Common::kConsumers;
  using Common::kHeadDim;
  using Common::kHeadDimV;
  using Common::kStages;
  using Common::kTileM;
  using Common::kTileN;
  using Common::kWarpgroupM;
  using typename Common::Element;

  static constexpr int kKeys = Tile::kTileN;
  static constexpr int kQueryStages = 2;
  static constexpr int kConsumerThreads = kConsumers * cutlass::NumThreadsPerWarpGroup;
  static constexpr int kWarps = kConsumers * cutlass::NumWarpsPerWarpGroup;
  static constexpr int kWarpM = 16;
  using Tiling = RowTiling<kTileM>;

  /// Of a warpgroup with so many queries.
  static constexpr WindowKeys keys(int queries) { return {queries, kKeys}; }

  // What the tile's last warpgroup may be shifted by, and one box of TMA brings.
  static constexpr int kTileKeys = keys(WindowKeys::kMostQueries).of_tile(kConsumers);
  static_assert(kHeadDim == 64 && kHeadDimV == 64, "a row is one row of the swizzle");
  static_assert(kTileKeys <= 256, "a box of TMA has 256 rows at most");

  using MmaQk = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupM>, cute::Int<kKeys>, cute::Int<kHeadDim>>>()));

  // K of a warpgroup's block, and V as the B operand (head_dim_v, keys).
  template <int kRows>
  using LayoutOf = decltype(cute::tile_to_shape(
      typename Common::SwizzleAtom{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>>{}));
  using LayoutK = LayoutOf<kKeys>;
  using LayoutVt = decltype(cute::composition(
      LayoutOf<kTileN>{}, cute::make_layout(cute::Shape<cute::Int<kHeadDimV>, cute::Int<kTileN>>{},
                                            cute::Stride<cute::Int<kTileN>, cute::_1>{})));

  static constexpr int kRowBytes = kHeadDim * sizeof(Element);
  static constexpr int kBytesQ = kTileM * kRowBytes;
  static constexpr int kStageBytes = kTileKeys * kRowBytes;  // of K, and of V

  struct SharedStorage {
    // 1024 bytes is the period of the 128-byte swizzle.
    alignas(1024) Element k[kStages][kTileKeys * kHeadDim];
    alignas(1024) Element v[kStages][kTileKeys * kHeadDimV];
    alignas(1024) Element q[kQueryStages][kTileM * kHeadDim];
    alignas(1024) Element o[kWarps][kWarpM * kHeadDimV];
    // Full: TMA's bytes have landed, and what is known of the tile stands in `tiles`. Empty: every
    // consumer warp is done reading.
    cutlass::arch::ClusterTransactionBarrier q_full[kQueryStages];
    cutlass::arch::ClusterBarrier q_empty[kQueryStages];
    cutlass::arch::ClusterTransactionBarrier kv_full[kStages];
    cutlass::arch::ClusterBarrier kv_empty[kStages];
    // In a guarded pass, TMA's bytes of a stage, before the guard lets consumers see them.
    cutlass::arch::ClusterTransactionBarrier kv_landed[kStages];
    SeenTile tiles[kQueryStages];
    CtaPasses passes;
  };
};

}  // namespace cute_kernels::attention
