#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>

#include "cute_kernels/attention/fp8_tile_config.hpp"
#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/measured_choice.hpp"
#include "cute_kernels/torch/require.hpp"

// The automatic choice, for those who want to know it or to change it.
namespace cute_kernels::binding {
namespace {

using attention::AttentionCall;
using attention::ElementType;
using attention::KernelTable;
using attention::ScoreType;
using torch::headeronly::ScalarType;

AttentionCall call_of_sizes(int64_t batch, int64_t seqlen_q, int64_t seqlen_k, int64_t heads,
                            int64_t head_dim, bool causal) {
  require(seqlen_q > 0, "seqlen_q is ", seqlen_q, ", must be above 0");
  for (int64_t size : {batch, seqlen_q, seqlen_k, heads, head_dim}) {
    require(size >= 0 && size < int64_t{1} << 30, size, " is not a size from 0 to below 2^30");
  }
  AttentionCall call{};
  call.sizes.batch = static_cast<int>(batch);
  call.sizes.seqlen_q = static_cast<int>(seqlen_q);
  call.sizes.seqlen_k = static_cast<int>(seqlen_k);
  call.sizes.heads_q = call.sizes.heads_kv = static_cast<int>(heads);
  call.sizes.head_dim = call.sizes.head_dim_v = static_cast<int>(head_dim);
  call.mask = attention::mask_spec(causal);
  return call;
}

template <class Kernel, class Dtype>
std::string name_of_choice(KernelTable<Kernel> const& kernels, Dtype dtype,
                           AttentionCall const& call) {
  auto const choose = [&] { return automatic_choice(kernels, dtype, call); };
  return kernel_for(kernels, choose, dtype, call, TileName(std::nullopt)).config.name;
}

/// The name of a row. FP8's dtype is that of Q and K.
std::string choose_tile_config(ScalarType dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                               int64_t heads, int64_t head_dim, bool causal,
                               int64_t multiprocessors, std::string of_pass) {
  require(multiprocessors > 0 && multiprocessors < int64_t{1} << 30, "multiprocessors is ",
          multiprocessors, ", must be from 1 to below 2^30");
  AttentionCall const call = call_of_sizes(batch, seqlen_q, seqlen_k, heads, head_dim, causal);
#ifdef CUTE_KERNELS_FP8
  if (of_pass == attention::Fp8ForwardKernel::kPass) {
    require(dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn, "dtype is ",
            DtypeOf{dtype}, ", must be int8 or float8_e4m3fn");
    return name_of_choice(attention::fp8_forward_kernels, score_type(dtype), call);
  }
#endif
  require(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "dtype is ", DtypeOf{dtype},
          ", must be float16 or bfloat16");
  ElementType const element = element_type(dtype);
  if (of_pass == attention::BackwardKernel::kPass) {
    return name_of_choice(attention::backward_kernels, element, call);
  }
  require(of_pass == attention::ForwardKernel::kPass, "this build has no ", of_pass, " kernels");
  auto const choose = [&] {
    return automatic_choice(element, call, static_cast<int>(multiprocessors));
  };
  TileName const automatic(std::nullopt);
  return kernel_for(attention::forward_kernels, choose, element, call, automatic).config.name;
}

template <class Kernel>
bool prefer_if_there(KernelTable<Kernel> const& kernels, std::string const& name,
                     AttentionCall const& call) {
  for (Kernel const& kernel : kernels) {
    if (kernel.config.name != name) continue;
    require(attention::can_take(kernel.config, kernel.config.dtype, call), "tile_config ", name,
            " takes head_dim up to ", kernel.config.head_dim, ", and head_dim is ",
            call.sizes.head_dim);
    measured_choice<Kernel>.set(call, kernel);
    return true;
  }
  return false;
}

/// From now on the automatic choice of calls of the kind is the row of this name, in its pass.
void prefer_tile_config(std::string name, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                        int64_t heads, int64_t head_dim, bool causal) {
  AttentionCall const call = call_of_sizes(batch, seqlen_q, seqlen_k, heads, head_dim, causal);
  bool const there = prefer_if_there(attention::forward_kernels, name, call) ||
#ifdef CUTE_KERNELS_FP8
                     prefer_if_there(attention::fp8_forward_kernels, name, call) ||
#endif
                     prefer_if_there(attention::backward_kernels, name, call);
  require(there, "tile_config ", name, " is not a row of this build");
}

}  // namespace
}  // namespace cute_kernels::binding

STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "choose_tile_config(ScalarType dtype, int batch, int seqlen_q, int seqlen_k, int heads, int "
      "head_dim, bool causal, int multiprocessors, str of_pass='forward') -> str");
  library.def(
      "prefer_tile_config(str tile_config, int batch, int seqlen_q, int seqlen_k, int heads, int "
      "head_dim, bool causal) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cute_kernels, CompositeExplicitAutograd, library) {
  library.impl("choose_tile_config", TORCH_BOX(&cute_kernels::binding::choose_tile_config));
  library.impl("prefer_tile_config", TORCH_BOX(&cute_kernels::binding::prefer_tile_config));
}
