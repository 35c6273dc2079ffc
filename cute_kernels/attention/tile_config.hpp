#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

#include <cuda_runtime_api.h>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/kernel_table.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/ranges.hpp"
#include "cute_kernels/attention/window/plan.hpp"

// What the dispatcher knows of the compiled kernels: rows of tile_configs.toml, and users' own.
namespace cute_kernels::attention {

enum class ElementType { kFloat16, kBFloat16 };

/// Which calls the automatic choice may give to a kernel; each kernel answers every mask when asked
/// for by name. kNone: those alone that it was measured to be the fastest for.
enum class MaskClass { kAny, kFull, kCausal, kNone };

/// The columns of a row that decide whether a kernel can take a call.
template <class Dtype>
struct RowConfig {
  char const* name;
  Dtype dtype;
  int head_dim;  // the kernel takes head dims up to these
  int head_dim_v;
  bool any_call;  // every call, rather than dense ones without sinks whose mask is none or causal
  bool softcap;   // calls with a softcap, and only these
  char const* variant;  // calls of this variant of a user's, and only these; or null
  MaskClass mask;
};

/// Of a forward row also those that tell how well.
struct TileConfig : RowConfig<ElementType> {
  int tile_m;    // queries of one CTA
  double speed;  // throughput on long sequences, relative to the other rows of the head dim
  int overhead;  // what a tile costs beside its keys, in keys
  // Calls with a window so short that a warpgroup's keys are tile_n (fits_window), and only these.
  bool grouped = false;
  int tile_n = 0;
};

struct ForwardKernel {
  using Problem = ForwardProblem;
  static constexpr char const* kPass = "forward";
  TileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

struct BackwardTileConfig : RowConfig<ElementType> {
  int tile_n;  // keys of one CTA
};

struct BackwardKernel {
  using Problem = BackwardProblem;
  static constexpr char const* kPass = "backward";
  BackwardTileConfig config;
  int64_t (*workspace_bytes)(Problem const&);
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

extern KernelTable<ForwardKernel> forward_kernels;
extern KernelTable<BackwardKernel> backward_kernels;

/// Whether a row is one for the call's dtype, head dims, softcap and variant.
template <class Dtype>
bool is_for(RowConfig<Dtype> const& config, Dtype dtype, AttentionCall const& call) {
  return config.dtype == dtype && config.head_dim >= call.sizes.head_dim &&
         config.head_dim_v >= call.sizes.head_dim_v && config.softcap == (call.softcap > 0.f) &&
         (config.variant != nullptr) == call.has_variant;
}

/// Whether the kernel of this row computes the call: every launch asks here first.
template <class Dtype>
bool can_take(RowConfig<Dtype> const& config, Dtype dtype, AttentionCall const& call) {
  return is_for(config, dtype, call) &&
         (config.any_call || (call.sinks == nullptr && kernel_ranges(call).has_value()));
}
inline bool can_take(TileConfig const& config, ElementType dtype, AttentionCall const& call) {
  if (config.grouped) return is_for(config, dtype, call) && fits_window(call, config.tile_n);
  RowConfig<ElementType> const& row = config;
  return can_take(row, dtype, call);
}

/// Whether the automatic choice may give the call to it.
template <class Config, class Dtype>
bool may_take(Config const& config, Dtype dtype, AttentionCall const& call) {
  auto const ranges = kernel_ranges(call);
  MaskClass const wanted = ranges && !ranges->causal ? MaskClass::kFull : MaskClass::kCausal;
  return can_take(config, dtype, call) && (config.mask == MaskClass::kAny || config.mask == wanted);
}

/// What the products of a row cost, for each query and key: it pads the head dims to its own.
template <class Dtype>
int channels(RowConfig<Dtype> const& config) {
  return config.head_dim + config.head_dim_v;
}

/// Time of a call in arbitrary units: rounds of tiles over the multiprocessors, each as long as its
/// queries and keys. A tile that is not full costs only what it has. Tiles of unequal length fill
/// the last round, as far as they are unequal; but nothing is faster than the longest. Of packed
/// sequences the host knows no more than the sum of their lengths: they count as equal.
inline double estimate_forward(TileConfig const& config, AttentionCall call, int multiprocessors) {
  CallSizes& sizes = call.sizes;
  if (call.is_packed()) {
    auto mean = [&](int rows) { return (rows + sizes.batch - 1) / std::max(1, sizes.batch); };
    sizes.seqlen_q = mean(call.packed.total_q);
    sizes.seqlen_k = mean(call.packed.total_k);
  }
  double const block = config.tile_n;
  VisitedKeys const keys = config.grouped ? VisitedKeys{block, block, block}
                                          : visited_keys(WindowRanges(call), config.tile_m);
  double rounds = static_cast<double>(sizes.seqlen_q) / config.tile_m * sizes.batch *
                  sizes.heads_q / multiprocessors;
  if (keys.most > 0) rounds += (std::ceil(rounds) - rounds) * keys.least / keys.most;
  double const time = std::max(rounds * (keys.mean + config.overhead), keys.most + config.overhead);
  return time * config.tile_m / config.speed;
}

/// Of the kernels with the smallest fitting head dims whose mask class allows the call, the one
/// with the shortest estimate, the first of equals; null where there is none. Where kernels for
/// dense calls fit, no others; where those for short windows do, none that takes any call: its
/// tiles have the queries of one head, which see more keys, and of a short sequence are not full.
inline ForwardKernel const* choose_forward(ElementType dtype, AttentionCall const& call,
                                           int multiprocessors) {
  ForwardKernel const* best = nullptr;
  std::tuple<int, int, double> best_cost;  // the first that differs decides
  for (ForwardKernel const& kernel : forward_kernels) {
    TileConfig const& config = kernel.config;
    if (!may_take(config, dtype, call)) continue;
    std::tuple const cost(channels(config), config.any_call ? 2 : int{config.grouped},
                          estimate_forward(config, call, multiprocessors));
    if (best == nullptr || cost < best_cost) {
      best = &kernel;
      best_cost = cost;
    }
  }
  return best;
}

/// The last of the kernels with the smallest fitting head dims, so that one that was added comes
/// before the build's; null where there is none. Where kernels for dense calls fit, none that takes
/// any, unless `any_call`, which leaves only these.
template <class Kernel, class Dtype>
Kernel const* choose_fitting(KernelTable<Kernel> const& kernels, Dtype dtype,
                             AttentionCall const& call, bool any_call = false) {
  Kernel const* best = nullptr;
  auto cost = [](Kernel const& kernel) {
    return std::tuple(channels(kernel.config), kernel.config.any_call);
  };
  for (Kernel const& kernel : kernels) {
    if (!may_take(kernel.config, dtype, call) || (any_call && !kernel.config.any_call)) continue;
    if (best == nullptr || cost(kernel) <= cost(*best)) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
