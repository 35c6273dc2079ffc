#pragma once

#include <optional>

// What one call of attention computes, in whatever pass and number format. Plain structs: nothing
// here needs a CUDA compiler.
namespace cute_kernels::attention {

struct CallSizes {
  int batch;
  int seqlen_q;
  int seqlen_k;
  int heads_q;
  int heads_kv;
  int head_dim;    // of Q and K
  int head_dim_v;  // of V and the output
};

/// Which keys a query sees. Query i stands at key position i + diagonal and sees the keys j with
///
///   i + diagonal - left <= j <= i + diagonal + right  and  0 <= j < seqlen_k.
///
/// No value is no limit on that side; without a diagonal it is seqlen_k - seqlen_q, by the lengths
/// of each batch entry, so that the last query stands at the last key (bottom-right aligned).
/// Limits may be negative. So
/// - all keys: nothing is set, and the diagonal has no meaning;
/// - causal: right = 0;
/// - a window: left and right, and with right = 0 causal beside it;
/// - top-left aligned: diagonal = 0;
/// - a part of the queries against a part of the keys: diagonal = the position of the first query
///   less that of the first key.
struct MaskSpec {
  std::optional<int> diagonal;
  std::optional<int> left;
  std::optional<int> right;
};

inline MaskSpec mask_spec(bool causal) {
  MaskSpec mask;
  if (causal) mask.right = 0;
  return mask;
}

/// Where packed sequences lie: one behind the other, in tensors without a batch. Sequence i has the
/// rows from cu_seqlens[i] up to before cu_seqlens[i + 1], of which it uses the first seqused[i].
/// What the pointers, all of device memory, hold is known to the device alone, and may change from
/// run to run of a CUDA graph. lengths.hpp reads it.
struct PackedLengths {
  int const* cu_seqlens_q;  // (batch + 1); null: the call is dense
  int const* cu_seqlens_k;
  int const* seqused_q;  // (batch), or null: all of them
  int const* seqused_k;
  int const* diagonal;  // (batch), or null: that of the call's mask
  int total_q;          // rows of Q
  int total_k;
};

struct AttentionCall {
  CallSizes sizes;  // of packed sequences: how many, and no less than the longest one's lengths
  MaskSpec mask;
  float scale;  // of the scores, finite, > 0
  PackedLengths packed{};
  // Forward: (heads_q), a score of each head that stands in every row's softmax beside those of the
  // keys, without a value; -inf is none. Null: no head has one. Backward finds them in its lse.
  float const* sinks = nullptr;
  // Where above 0, scores become softcap * tanh(score / softcap), before the mask.
  float softcap = 0.f;
  // Kernels of a user's variant answer, which the caller names.
  bool has_variant = false;

  constexpr bool is_packed() const { return packed.cu_seqlens_q != nullptr; }
};

}  // namespace cute_kernels::attention
