#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "cute_kernels/attention/kernel_table.hpp"
#include "cute_kernels/attention/problem.hpp"

// What the dispatcher knows of the compiled kernels: rows of tile_configs.toml, and users' own.
namespace cute_kernels::attention {

enum class ElementType { kFloat16, kBFloat16 };

/// Which calls the automatic choice may give to a kernel; each kernel answers every mask when asked
/// for by name.
enum class MaskClass { kAny, kFull, kCausal };

/// The columns of a row that decide whether a kernel can take a call, and how well.
struct TileConfig {
  char const* name;
  ElementType dtype;
  int head_dim;  // the kernel takes head dims up to this one
  int head_dim_v;
  MaskClass mask;
  int tile_m;    // queries of one CTA
  double speed;  // throughput on long sequences, relative to the other rows of the head dim
  int overhead;  // what a tile costs beside its keys, in keys
};

/// What the automatic choice looks at.
struct CallShape {
  ElementType dtype;
  int64_t batch;
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t heads_q;
  int64_t head_dim;
  bool causal;
};

struct ForwardKernel {
  using Problem = ForwardProblem;
  static constexpr char const* kPass = "forward";
  TileConfig config;
  cudaError_t (*launch)(Problem const&, cudaStream_t);
};

struct BackwardTileConfig {
  char const* name;
  ElementType dtype;
  int head_dim;  // the kernel takes head dims up to this one
  MaskClass mask;
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

/// Whether the automatic choice may give the call to the kernel of this row.
template <class Config>
bool may_take(Config const& config, CallShape const& shape) {
  MaskClass const wanted = shape.causal ? MaskClass::kCausal : MaskClass::kFull;
  return config.dtype == shape.dtype && config.head_dim >= shape.head_dim &&
         (config.mask == MaskClass::kAny || config.mask == wanted);
}

/// Time of a call in arbitrary units: rounds of tiles over the multiprocessors, each as long as its
/// queries and keys. A tile that is not full costs only what it has. Tiles of unequal length fill
/// the last round, as far as they are unequal; but nothing is faster than the longest. What the
/// diagonal of a causal mask wastes grows with tile_m.
inline double estimate_forward(TileConfig const& config, CallShape const& shape,
                               int multiprocessors) {
  double const seqlen_q = static_cast<double>(shape.seqlen_q);
  double const longest = static_cast<double>(shape.seqlen_k);
  double const shortest = shape.causal ? std::max(0.0, longest - seqlen_q) : longest;
  double keys = longest;
  if (shape.causal) {
    keys = longest >= seqlen_q ? longest - seqlen_q / 2 : longest * longest / (2 * seqlen_q);
    keys += config.tile_m / 2;
  }
  double rounds = seqlen_q / config.tile_m * shape.batch * shape.heads_q / multiprocessors;
  if (longest > 0) rounds += (std::ceil(rounds) - rounds) * shortest / longest;
  double const time = std::max(rounds * (keys + config.overhead), longest + config.overhead);
  return time * config.tile_m / config.speed;
}

/// Of the kernels with the smallest fitting head dim whose mask class allows the call, the one with
/// the shortest estimate, the first of equals; null where there is none.
inline ForwardKernel const* choose_forward(CallShape const& shape, int multiprocessors) {
  ForwardKernel const* best = nullptr;
  double best_time = 0;
  for (ForwardKernel const& kernel : forward_kernels) {
    TileConfig const& config = kernel.config;
    if (!may_take(config, shape)) continue;
    if (best != nullptr && config.head_dim > best->config.head_dim) continue;
    double const time = estimate_forward(config, shape, multiprocessors);
    if (best == nullptr || config.head_dim < best->config.head_dim || time < best_time) {
      best = &kernel;
      best_time = time;
    }
  }
  return best;
}

/// The last of the kernels with the smallest fitting head dim, so that one that was added comes
/// before the build's; null where there is none.
inline BackwardKernel const* choose_backward(CallShape const& shape) {
  BackwardKernel const* best = nullptr;
  for (BackwardKernel const& kernel : backward_kernels) {
    if (!may_take(kernel.config, shape)) continue;
    if (best == nullptr || kernel.config.head_dim <= best->config.head_dim) best = &kernel;
  }
  return best;
}

}  // namespace cute_kernels::attention
