#include "cute_kernels/torch/eight_bits.hpp"

#include <cstdint>
#include <limits>

#include "cute_kernels/torch/call.hpp"
#include "cute_kernels/torch/require.hpp"

namespace cute_kernels::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_8_bits(ScalarType dtype) {
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Char;
}

void read_scales(char const* name, std::optional<Tensor> const& tensor, Argument const& k_cache,
                 int64_t batch, attention::FactorView& sequences, attention::FactorView* rows) {
  if (!tensor) return;
  Argument const a(name, *tensor);
  check_device(a, k_cache);
  require(a.dtype == ScalarType::Float, name, " is not float32");
  int const heads_dim = static_cast<int>(a.sizes.size()) - 1;
  require(heads_dim == 1 || (heads_dim == 2 && rows != nullptr), name,
          " does not have the shape of factors");
  require(a.size(heads_dim) == k_cache.size(2), name, " does not have k_cache's heads");
  auto const* const data = static_cast<float const*>(tensor->data_ptr());
  if (heads_dim == 1) {
    require(a.size(0) == batch, name, " does not have batch ", batch);
    sequences = {data, a.stride(0), 0, a.stride(1)};
    return;
  }
  require(a.size(0) == k_cache.size(0) && (a.size(1) == k_cache.size(1) || a.size(1) == 1), name,
          " does not have k_cache's pages and rows");
  for (int dim = 0; dim < 3; ++dim) {  // a kernel reads 32 bits of it (decode/load.hpp)
    require(a.size(dim) <= 1 || a.stride(dim) <= std::numeric_limits<uint32_t>::max(), name,
            " has a stride of 2^32 or more");
  }
  *rows = {data, a.stride(0), a.size(1) == 1 ? 0 : a.stride(1), a.stride(2)};
}

}  // namespace cute_kernels::binding
