#include <torch/csrc/stable/library.h>

// Sequences that lie one behind the other: q (total_q, heads, head_dim), LSE (heads, total_q).
// Sequence i has the rows cu_seqlens[i] to cu_seqlens[i + 1], of which it uses the first
// seqused[i]. Its query j stands at key position j + diagonal[i], without diagonals bottom-right
// aligned.
STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? diagonal, "
      "float softmax_scale, bool causal, Tensor? sinks=None, *, SymInt? max_seqlen_q=None, "
      "SymInt? max_seqlen_k=None, SymInt? window_left=None, SymInt? window_right=None, "
      "bool deterministic=False, str? tile_config=None, float softcap=0.0, "
      "SymInt sm_margin=0) -> (Tensor out, Tensor lse)");
  library.def(
      "flash_attn_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, "
      "Tensor? seqused_k, Tensor? diagonal, float softmax_scale, bool causal, "
      "Tensor? sinks=None, *, "
      "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, SymInt? window_left=None, "
      "SymInt? window_right=None, bool deterministic=False, str? tile_config=None, float "
      "softcap=0.0, SymInt sm_margin=0) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks)");
  // The same into given tensors, or added to them.
  library.def(
      "flash_attn_varlen_backward_into(Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, "
      "bool add_to_q, bool add_to_kv, Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
      "Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "Tensor? seqused_q, Tensor? seqused_k, Tensor? diagonal, float softmax_scale, bool causal, "
      "Tensor? sinks=None, *, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
      "SymInt? window_left=None, SymInt? window_right=None, bool deterministic=False, "
      "str? tile_config=None, float softcap=0.0, SymInt sm_margin=0) -> Tensor grad_sinks");
}
