#pragma once

#include <cstdint>
#include <optional>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/fp8/problem.hpp"
#include "cute_kernels/torch/require.hpp"

// What the FP8 operators share: checks, and how a call's tensors are quantised. What is refused
// here is refused in few words: Python's fp8/checks.py then says what is wrong.
namespace cute_kernels::binding {

constexpr int64_t kFp8Limit = 1 << 30;  // of each size, and of the tiles of a call
constexpr int kKeyPadding = 16;         // V's keys are padded to a multiple of it

void check_fp8_tensor(Argument const& a, size_t rank);
void check_fp8_head_dim(Argument const& a, int64_t head_dim);
void check_16_bits(Argument const& a);

int64_t blocks_of(int64_t size, int64_t block);

/// Where the rows of one tensor lie. Of packed sequences it points to the device.
struct SourceRows {
  int64_t batch;
  int const* cu_seqlens = nullptr;  // null: they are not packed
  int const* seqused = nullptr;

  bool is_packed() const { return cu_seqlens != nullptr; }
};

/// Of q and of k and v.
SourceRows query_rows(attention::AttentionCall const& call);
SourceRows key_rows(attention::AttentionCall const& call);

/// Q or K, quantised: results that are not computed yet, and the tensors that live until they are.
struct Fp8Rows {
  torch::stable::Tensor data;   // of the input's shape
  torch::stable::Tensor scale;  // (batch, heads, blocks), packed (1, heads, blocks of all)
  torch::stable::Tensor shift;  // (batch, heads, head_dim), or with 0 for the last
  torch::stable::Tensor readable;
  std::optional<fp8::SampleProblem> key_center;
  std::optional<fp8::QuantizeRowsProblem> problem;
};

/// V as the attention kernel reads it.
struct Fp8Values {
  torch::stable::Tensor data;   // (batch, heads, head_dim, keys padded), packed without batch
  torch::stable::Tensor scale;  // (batch, heads, head_dim), or with 0 for the last if v is e4m3
  torch::stable::Tensor scratch;
  torch::stable::Tensor readable;
  std::optional<fp8::SampleProblem> maximum;
  std::optional<fp8::QuantizeValuesProblem> problem;
};

void check_fp8_rows(Argument const& x, size_t rank);
void check_fp8_values(Argument const& v, size_t rank);

/// With `smooth`, what most rows have in common is subtracted from all.
Fp8Rows prepare_rows(Argument const& x, SourceRows const& rows, bool smooth, bool incoherent,
                     int64_t seed, bool to_int8);
Fp8Values prepare_values(Argument const& v, SourceRows const& rows);

}  // namespace cute_kernels::binding
