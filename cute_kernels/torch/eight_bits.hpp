#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "cute_kernels/attention/decode/fp8_problem.hpp"
#include "cute_kernels/torch/tensor.hpp"

// What calls with caches of 8 bits have in common.
namespace cute_kernels::binding {

bool is_8_bits(torch::headeronly::ScalarType dtype);

/// The factors of a call's sequences (batch, key heads), or if `rows` is given of the cache's rows
/// (pages, page_size or 1, key heads), checked; nothing changes where there is no tensor.
void read_scales(char const* name, std::optional<torch::stable::Tensor> const& tensor,
                 Argument const& k_cache, int64_t batch, attention::FactorView& sequences,
                 attention::FactorView* rows);

}  // namespace cute_kernels::binding
