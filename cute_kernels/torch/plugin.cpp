#include <cstdint>
#include <string>
#include <tuple>

#include <dlfcn.h>

#include <torch/csrc/stable/library.h>

#include "cute_kernels/attention/plugin.hpp"
#include "cute_kernels/torch/require.hpp"
#include "headers_digest.hpp"

// Kernels that were compiled after this build.
namespace cute_kernels::binding {
namespace {

using attention::KernelTable;
using attention::kPluginAbi;
using attention::Plugin;

template <class Kernel>
bool add_if_of_pass(KernelTable<Kernel>& kernels, Plugin const& plugin, std::string const& path) {
  if (std::string(plugin.pass) != Kernel::kPass) return false;
  constexpr int32_t kProblemBytes = sizeof(typename Kernel::Problem);
  constexpr int32_t kKernelBytes = sizeof(Kernel);
  require(plugin.problem_bytes == kProblemBytes && plugin.kernel_bytes == kKernelBytes, path,
          " has structs of ", plugin.problem_bytes, " and ", plugin.kernel_bytes,
          " bytes for a problem and a kernel, this build ", kProblemBytes, " and ", kKernelBytes,
          ": compile it again");
  require(kernels.is_built(), path, " holds a ", plugin.pass, " kernel, and this build has none");
  Kernel const& kernel = *static_cast<Kernel const*>(plugin.kernel);
  require(kernels.add(kernel), path, " holds ", kernel.config.name,
          ", and there is a kernel of that name already");
  return true;
}

/// Why a library cannot be used is in the error; it stays open, but nothing of it is called.
void load_plugin(std::string path) {
  // Its symbols stay its own.
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  require(library != nullptr, "cannot load a kernel: ", library == nullptr ? dlerror() : "");
  using Entry = Plugin const* (*)();
  auto const entry = reinterpret_cast<Entry>(dlsym(library, "cute_kernels_plugin"));
  require(entry != nullptr, path, " is no kernel of cute_kernels: it has no cute_kernels_plugin");
  Plugin const& plugin = *entry();
  require(plugin.abi == kPluginAbi, path, " has plug-in ABI ", plugin.abi, ", this build ",
          kPluginAbi, ": compile it again");
  require(std::string(plugin.headers) == kHeadersDigest, path,
          " was compiled against headers of digest ", plugin.headers, ", this build has ",
          kHeadersDigest, ": compile it again");
  bool const known = add_if_of_pass(attention::forward_kernels, plugin, path) ||
#ifdef CUTE_KERNELS_FP8
                     add_if_of_pass(attention::fp8_forward_kernels, plugin, path) ||
                     add_if_of_pass(attention::fp8_decode_kernels, plugin, path) ||
#endif
                     add_if_of_pass(attention::decode_kernels, plugin, path) ||
                     add_if_of_pass(attention::prefill_kernels, plugin, path) ||
                     add_if_of_pass(attention::latent_kernels, plugin, path) ||
                     add_if_of_pass(attention::backward_kernels, plugin, path);
  require(known, path, " holds a ", plugin.pass, " kernel, and this build has none");
}

/// What a plug-in must agree with.
std::tuple<int64_t, std::string> plugin_requirements() { return {kPluginAbi, kHeadersDigest}; }

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def("load_plugin(str path) -> ()");
  library.def("plugin_requirements() -> (int abi, str headers)");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CompositeExplicitAutograd, library) {
  library.impl("load_plugin", TORCH_BOX(&cute_kernels::binding::load_plugin));
  library.impl("plugin_requirements", TORCH_BOX(&cute_kernels::binding::plugin_requirements));
}
