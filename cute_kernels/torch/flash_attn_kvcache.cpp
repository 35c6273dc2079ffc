#include <torch/csrc/stable/library.h>

// Attention to a cache of keys and values. q (total_q, heads, head_dim) holds the queries of all
// sequences one behind the other, LSE is (heads, total_q). Of sequence i the cache holds
// cache_seqlens[i] rows, in entry cache_batch_idx[i] (without it: i) or in the pages page_table[i];
// keys are those from cache_leftpad[i] on. Masks are bottom-right aligned to these keys. A cache of
// 8 bits holds numbers that are multiplied by descales, float32: (batch, key heads), K's and V's
// else (pages, page_size or 1, key heads). With rotation_seed keys are rotated, as fp8/rotation.py
// says, and q is too. tree_mask (total_q) has 64 bits for each query: which of its sequence's last
// keys, as many as it has queries, it may see. With qv (total_q, heads, v_cache's head_dim) values
// are keys too: scores are those of (q, qv) and (k, v).
STABLE_TORCH_LIBRARY_FRAGMENT(cute_kernels, library) {
  library.def(
      "flash_attn_kvcache_forward(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, "
      "Tensor cache_seqlens, Tensor? page_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
      "Tensor? sinks, float softmax_scale, bool causal, Tensor? q_descale=None, "
      "Tensor? k_descale=None, Tensor? v_descale=None, Tensor? tree_mask=None, Tensor? qv=None, "
      "*, "
      "SymInt? max_seqlen_q=None, SymInt? window_left=None, SymInt? window_right=None, "
      "float softcap=0.0, SymInt num_splits=0, SymInt sm_margin=0, SymInt? rotation_seed=None, "
      "SymInt attention_chunk=0) -> "
      "(Tensor out, Tensor lse)");
  // The same with its output in `out`, dense.
  library.def(
      "flash_attn_kvcache_forward_out(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, "
      "Tensor cu_seqlens_q, Tensor cache_seqlens, Tensor? page_table, Tensor? cache_batch_idx, "
      "Tensor? cache_leftpad, Tensor? sinks, float softmax_scale, bool causal, "
      "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
      "Tensor? tree_mask=None, Tensor? qv=None, *, SymInt? max_seqlen_q=None, "
      "SymInt? window_left=None, "
      "SymInt? window_right=None, float softcap=0.0, SymInt num_splits=0, "
      "SymInt sm_margin=0, SymInt? rotation_seed=None, SymInt attention_chunk=0) -> "
      "Tensor lse");
}
