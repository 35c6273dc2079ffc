#pragma once

#include <cstdint>
#include <optional>

#include "cute_kernels/attention/problem.hpp"

// Plain structs that the framework binding fills and the launch code reads. Nothing here needs a
// CUDA compiler.
namespace cute_kernels::fp8 {

using attention::TensorView;

inline constexpr int kMaxHeadDim = 256;
inline constexpr int kBlockRows = 64;  // rows of Q and K that share a scale

/// The signs of all channels, one bit each (set: minus). Made on the host, passed by value.
struct Signs {
  uint32_t words[kMaxHeadDim / 32];
};

/// Sign of channel c: the top bit of SplitMix64's output number c.
inline Signs random_signs(uint64_t seed) {
  Signs signs{};
  uint64_t state = seed;
  for (int channel = 0; channel < kMaxHeadDim; ++channel) {
    state += 0x9E3779B97F4A7C15u;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    signs.words[channel / 32] |= static_cast<uint32_t>(z >> 63) << (channel % 32);
  }
  return signs;
}

enum class InputType { kFloat16, kBFloat16, kE4m3 };

/// What a kernel that quantises reads: (batch, seqlen, heads, head_dim), or of packed sequences
/// (seqlen, heads, head_dim); pointer and byte strides multiples of 16, head_dim one of 16. What is
/// said of a batch entry is said of each sequence, too, and of its rows of the rows that it uses.
struct Source {
  InputType type;
  int batch;   // or how many sequences
  int seqlen;  // or the rows of all
  int heads;
  int head_dim;
  TensorView in;
  int const* cu_seqlens;  // as PackedLengths has them; null: not packed
  int const* seqused;
  int first_block = 0;  // of a launch, where one does not reach all
  int first_batch = 0;

  constexpr bool is_packed() const { return cu_seqlens != nullptr; }
};

/// Q or K, in 16 bits, to 8 bits.
struct QuantizeRowsProblem : Source {
  bool to_int8;  // or to e4m3
  void* out;     // as the input's shape, dense
  // (batch, heads, blocks of kBlockRows rows), dense; of packed sequences (heads, blocks of all),
  // as attention::first_block() counts these.
  float* scale;
  float const* shift;  // (batch, heads, head_dim), subtracted from every row; may be null
  bool incoherent;
  Signs signs;
};

/// What was subtracted from the keys' scores, of Q in 16 bits.
struct ScoreOffsetProblem : Source {
  float const* shift;  // (batch, key heads, head_dim): of K
  int heads_per_kv;
  float scale;    // of the scores
  float* result;  // (batch, heads, seqlen), of packed sequences (heads, seqlen)
};

/// What about 256 rows of every head, in 16 bits, tell: of K what most have in common, which is
/// subtracted from all rows, of V the range of elements.
struct SampleProblem : Source {
  float* result;    // (batch, heads, head_dim), dense
  int* overflowed;  // of V: (batch, heads), cleared; else null
};

/// V, in 16 bits or e4m3, to e4m3, transposed.
struct QuantizeValuesProblem : Source {
  // (batch, heads, head_dim, seqlen padded to 16), keys in value_key_order; of packed sequences
  // (heads, head_dim, keys of all), as Fp8ForwardProblem says.
  void* out;
  float* maximum;   // (batch, heads, head_dim), to be scaled for; what follows is null for e4m3
  int* overflowed;  // (batch, heads), scratch: whether an element was too large
  float* scale;     // (batch, heads, head_dim)
};

/// What one call quantises, of one GPU.
struct QuantizeProblem {
  std::optional<SampleProblem> key_center;     // what k.shift is
  std::optional<SampleProblem> value_maximum;  // what v.maximum is
  std::optional<QuantizeRowsProblem> q;
  std::optional<QuantizeRowsProblem> k;
  std::optional<ScoreOffsetProblem> score_offset;  // whose shift is k.shift
  std::optional<QuantizeValuesProblem> v;
};

}  // namespace cute_kernels::fp8
