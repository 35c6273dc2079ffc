#pragma once

#include <cstdint>

#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/require.hpp"

// What the 16-bit operators share: the checks of q, k and v, and the look-up of a kernel.
namespace cute_kernels::binding {

constexpr int kElementBytes = 2;
constexpr int64_t kAutomatic = -1;  // tile_config that asks for the automatic choice

/// q, k and v as the caller gave them, checked.
struct Call : attention::CallShape {
  int64_t heads_kv;
};

Call check_call(Argument const& q, Argument const& k, Argument const& v, double softmax_scale,
                bool causal);

/// Throws unless `a` is where q is.
void check_device(Argument const& a, Argument const& q);

/// Throws unless `a` is where q is, with q's dtype.
void check_like(Argument const& a, Argument const& q);

attention::ElementType element_type(torch::headeronly::ScalarType dtype);

char const* name_of(attention::ElementType dtype);

/// `chosen` by the automatic choice if that is what tile_config asks for, else the kernel of that
/// index, checked for the call.
template <class Kernel>
Kernel const& kernel_for(attention::Registry<Kernel> const& registry, Kernel const* chosen,
                         Call const& call, int64_t tile_config) {
  if (tile_config == kAutomatic) {
    if (chosen != nullptr) return *chosen;
    std::ostringstream there;
    for (Kernel const& kernel : registry) there << ' ' << kernel.config.name;
    fail("no ", Kernel::kPass, " kernel for ", name_of(call.dtype), ", head_dim ", call.head_dim,
         ", ", call.causal ? "causal" : "full", " in this build, which has", there.str());
  }
  require(tile_config >= 0 && tile_config < registry.count, "tile_config is ", tile_config,
          ", must be ", kAutomatic, " (automatic) or an index below ", registry.count);
  auto const& config = registry.kernels[tile_config].config;
  require(config.dtype == call.dtype && config.head_dim >= call.head_dim, "tile_config ",
          tile_config, " (", config.name, ") takes ", name_of(config.dtype),
          " with head_dim up to ", config.head_dim, ", but q is ", name_of(call.dtype),
          " with head_dim ", call.head_dim);
  return registry.kernels[tile_config];
}

}  // namespace cute_kernels::binding
