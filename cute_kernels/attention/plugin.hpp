#pragma once

#include <cstdint>

#include "cute_kernels/attention/decode/fp8_tile_config.hpp"
#include "cute_kernels/attention/decode/tile_config.hpp"
#include "cute_kernels/attention/fp8_problem.hpp"
#include "cute_kernels/attention/fp8_tile_config.hpp"
#include "cute_kernels/attention/latent/tile_config.hpp"
#include "cute_kernels/attention/prefill/tile_config.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/tile_config.hpp"

// A plug-in: a shared library with one kernel more, compiled against the headers of a build. Its
// only symbol is a function without parameters, cute_kernels_plugin, which returns a Plugin.
namespace cute_kernels::attention {

/// Of Plugin itself. A change of what stands in Plugin, or of its order, is a new number.
inline constexpr int32_t kPluginAbi = 1;

/// A build reads `abi` first and nothing else if it is not its own, then what else must agree, then
/// the kernel.
struct Plugin {
  int32_t abi;
  int32_t problem_bytes;
  int32_t kernel_bytes;
  char const* headers;  // the digest of those that it was compiled against
  char const* pass;     // what `kernel` points to
  void const* kernel;
};

template <class Kernel>
constexpr Plugin plugin_of(Kernel const& kernel, char const* headers) {
  return {kPluginAbi, sizeof(typename Kernel::Problem), sizeof(Kernel), headers, Kernel::kPass,
          &kernel};
}

}  // namespace cute_kernels::attention
