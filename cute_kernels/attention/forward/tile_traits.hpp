#pragma once

#include <type_traits>

#include <cutlass/pipeline/pipeline.hpp>

#include "cute_kernels/attention/forward/calls.hpp"
#include "cute_kernels/attention/variant/variant.hpp"

namespace cute_kernels::attention {

/// What is known of every forward kernel when it is compiled, from one row of tile_configs.toml,
/// whatever its number format.
///
/// The unit of work is a consumer warpgroup with 64 queries: its own slice of Q and O in shared
/// memory, its own accumulators. K and V blocks are shared by all consumer warpgroups of the CTA.
/// kAnyCall: it takes every call, rather than the dense ones whose mask is none or causal.
template <class Tile_, bool kAnyCall_ = false>
struct ForwardTileTraits {
  using Tile = Tile_;
  static constexpr bool kAnyCall = kAnyCall_;

  using Variant = NoVariant;
  static constexpr int kHeadDim = Tile::kHeadDim;
  static constexpr int kTileN = Tile::kTileN;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kConsumers = Tile::kConsumerWarpgroups;
  static constexpr bool kOverlap = Tile::kOverlap;
  static constexpr bool kPingpong = Tile::kPingpong;

  static constexpr int kWarpgroupM = 64;
  static constexpr int kTileM = kWarpgroupM * kConsumers;
  using Tiling = QueryTiling<kTileM, kTileN>;
  using Calls = std::conditional_t<kAnyCall, AnyCalls<Tiling::kNeighbours>, DenseCalls<kTileM>>;
  static constexpr int kThreads = cutlass::NumThreadsPerWarpGroup * (1 + kConsumers);

  // Registers of a thread after setmaxnreg, multiples of 8. A block's pool is what it starts with,
  // kThreads times kLaunchRegisters; asking for more would wait forever.
  static constexpr bool kReconfigureRegisters = kConsumers > 1;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers >= 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112;
  static_assert(!kReconfigureRegisters || kProducerRegisters + kConsumers * kConsumerRegisters <=
                                              (1 + kConsumers) * kLaunchRegisters);

  static_assert(kConsumers >= 1 && kConsumers <= 4);
  static_assert(!kPingpong || kConsumers > 1, "pingpong needs two consumer warpgroups or more");

  using Pipeline = cutlass::PipelineTmaAsync<kStages>;
  using PipelineState = typename Pipeline::PipelineState;
};

}  // namespace cute_kernels::attention
