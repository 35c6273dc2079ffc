#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include <torch/csrc/stable/c/shim.h>

#include "cute_kernels/attention/fp8_tile_config.hpp"
#include "cute_kernels/attention/tile_config.hpp"
#include "cute_kernels/torch/require.hpp"

// What the operators share: the checks of q, k and v, and the look-up of a kernel. They keep
// kernels from what they cannot take; what is wrong with a call that they refuse its caller is told
// in python/cute_kernels/checks.py.
namespace cute_kernels::binding {

constexpr int kElementBytes = 2;
constexpr int64_t kRowsLimit = (int64_t{1} << 31) - (1 << 10);  // of q and k together, of new rows
constexpr int kMaxHeadDim = 256;
constexpr int kMaxLatentDim = 512;  // of values that are keys too
constexpr int kMaxRopeDim = 64;     // of the keys beside these

/// The call that q and k, of any number format and with sizes that an int holds, make with a V of
/// head_dim_v, checked.
attention::AttentionCall call_of(Argument const& q, Argument const& k, int64_t head_dim_v,
                                 double softmax_scale, attention::MaskSpec const& mask);

/// The same of 16-bit q, k and v as the caller gave them, all of it checked.
attention::AttentionCall check_call(Argument const& q, Argument const& k, Argument const& v,
                                    double softmax_scale, attention::MaskSpec const& mask);

/// What check_call asks of q, k and v each, and of their dtypes and devices, whatever their rank.
void check_inputs(Argument const& q, Argument const& k, Argument const& v, size_t rank);

/// Throws unless it is a multiple of 8 up to `most`.
void check_head_dim(char const* name, int64_t head_dim, int64_t most = kMaxHeadDim);

/// Heads and head dims of a call, checked to be those of some; its lengths are left 0.
attention::CallSizes sizes_of(int64_t heads_q, int64_t heads_kv, int64_t head_dim,
                              int64_t head_dim_v);

/// As float32, checked.
float checked_scale(double softmax_scale);

/// As float32, checked; 0 is none.
float checked_softcap(double softcap);

/// The operators' arguments of a mask.
attention::MaskSpec mask_of(bool causal, std::optional<int64_t> left, std::optional<int64_t> right,
                            std::optional<int64_t> diagonal);

/// Throws unless `a` is where q is.
void check_device(Argument const& a, Argument const& q);

/// Throws unless `a` is where q is, with q's dtype.
void check_like(Argument const& a, Argument const& q);

/// The operators' argument sinks, checked, as kernels read it: (heads) in float32, dense, or
/// nothing. q's device must be the current one.
class Sinks {
 public:
  Sinks(std::optional<torch::stable::Tensor> const& sinks, Argument const& q, int heads);

  /// Null where there are none.
  float const* data() const {
    return tensor_ ? static_cast<float const*>(tensor_->data_ptr()) : nullptr;
  }

 private:
  std::optional<torch::stable::Tensor> tensor_;
};

attention::ElementType element_type(torch::headeronly::ScalarType dtype);
attention::ScoreType score_type(torch::headeronly::ScalarType dtype);

char const* name_of(attention::ElementType dtype);
char const* name_of(attention::ScoreType dtype);
/// Of its kind of mask, or that it is packed.
char const* name_of(attention::AttentionCall const& call);

/// The operators' argument tile_config, which the caller owns: a row's name, or nothing for the
/// automatic choice. A std::string parameter would be copied twice, and torch 2.13's conversion
/// loses one of the copies.
class TileName {
 public:
  explicit TileName(std::optional<StringHandle> handle);
  ~TileName();
  TileName(TileName const&) = delete;
  TileName& operator=(TileName const&) = delete;

  bool automatic() const { return !handle_.has_value(); }
  std::string_view name() const { return name_; }

 private:
  std::optional<StringHandle> handle_;
  std::string_view name_;
};

/// The kernel of a name, or what choose() finds where there is none, checked for the call.
template <class Kernel, class Choose, class Dtype>
Kernel const& kernel_for(attention::KernelTable<Kernel> const& kernels, Choose choose, Dtype dtype,
                         attention::AttentionCall const& call, TileName const& tile) {
  if (tile.automatic()) {
    Kernel const* const chosen = choose();
    if (chosen != nullptr) return *chosen;
    std::ostringstream there;
    for (Kernel const& kernel : kernels) there << ' ' << kernel.config.name;
    attention::CallSizes const& sizes = call.sizes;
    std::ostringstream of_v;
    if (sizes.head_dim_v != sizes.head_dim) of_v << " and " << sizes.head_dim_v << " of v";
    fail("no ", Kernel::kPass, " kernel for ", name_of(dtype), ", head_dim ", sizes.head_dim,
         of_v.str(), ", ", name_of(call), call.softcap > 0.f ? ", softcap" : "",
         " in this build, which has", there.str());
  }
  for (Kernel const& kernel : kernels) {
    if (kernel.config.name != tile.name()) continue;
    require(
        attention::can_take(kernel.config, dtype, call), "tile_config ", tile.name(),
        " does not take q's dtype, the head dims, the mask, packed sequences, sinks or softcap");
    return kernel;
  }
  fail("tile_config ", tile.name(), " is not a ", Kernel::kPass, " row of this build");
}

/// The kernel of a name, of the variant with this key, checked for the call.
template <class Kernel, class Dtype>
Kernel const& variant_kernel(attention::KernelTable<Kernel> const& kernels, Dtype dtype,
                             attention::AttentionCall const& call, TileName const& variant,
                             TileName const& tile) {
  require(!tile.automatic() && !variant.automatic(), "a variant's kernel has a name");
  Kernel const& kernel = kernel_for(kernels, [] { return nullptr; }, dtype, call, tile);
  require(variant.name() == kernel.config.variant, "tile_config ", tile.name(),
          " is not a kernel of the variant ", variant.name());
  return kernel;
}

}  // namespace cute_kernels::binding
