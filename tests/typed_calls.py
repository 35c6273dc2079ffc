"""What type checkers make of the package's calls: `mypy` looks at this file, nothing runs it."""

from torch import Tensor
from typing_extensions import assert_type

import cute_kernels as ck


def results(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, with_lse: bool) -> None:
    both = tuple[Tensor, Tensor]
    either = Tensor | both
    assert_type(ck.flash_attn_func(q, k, v), Tensor)
    assert_type(ck.flash_attn_func(q, k, v, None, True, window_size=(3, 0)), Tensor)
    assert_type(ck.flash_attn_func(q, k, v, return_lse=True), both)
    assert_type(ck.flash_attn_func(q, k, v, causal=True, return_attn_probs=True), both)
    assert_type(ck.flash_attn_func(q, k, v, sinks=q, return_lse=with_lse), either)
    assert_type(ck.flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, causal=True), Tensor)
    assert_type(ck.flash_attn_varlen_func(q, k, v, starts, starts, return_lse=True), both)
    assert_type(
        ck.flash_attn_varlen_func(q, k, v, starts, seqused_k=starts, page_table=starts), Tensor
    )
    assert_type(ck.flash_attn_with_kvcache(q, k, v, k, v, cache_seqlens=3), Tensor)
    assert_type(ck.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True), both)
    assert_type(ck.flash_attn_qkvpacked_func(q, num_heads_q=4), Tensor)
    assert_type(ck.flash_attn_varlen_qkvpacked_func(q, starts, return_lse=True), both)
    assert_type(ck.flash_attn_fp8_func(ck.quantize_fp8(q), k, v), Tensor)
    assert_type(ck.flash_attn_fp8_func(q, k, v, seed=1, return_lse=True), both)
    assert_type(ck.flash_attn_fp8_varlen_func(q, k, v, starts, starts, causal=True), Tensor)
    assert_type(ck.flash_attn_combine(q, k), both)
    assert_type(ck.append_kv(k, v, k, v, starts), Tensor)


def mistakes(q: Tensor, k: Tensor, v: Tensor) -> None:
    ck.flash_attn_func(q, k)  # type: ignore[call-overload]
    ck.flash_attn_func(q, k, v, casual=True)  # type: ignore[call-overload]
    ck.flash_attn_func(q, k, v, softcap="50")  # type: ignore[call-overload]
    ck.flash_attn_varlen_func(q, k, v)  # type: ignore[call-overload]
    ck.flash_attn_fp8_func(q, k, v, softcap=3.0)  # type: ignore[call-overload]
