"""What FlashAttention-2's compiled module has, as `flash_attn.flash_attn_interface.flash_attn_gpu`,
for libraries that call it past the Python functions (xformers, for one)."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.cache.checks import check_output
from cute_kernels.compat.flash_attn import flash_attn_interface as interface

Results = tuple[Tensor, ...]  # four


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: object,
) -> Results:
    """`_flash_attn_forward`, its output in `out` if given."""
    mask = (causal, window_size_left, window_size_right)
    options = (softcap, alibi_slopes, return_softmax)
    results = interface._flash_attn_forward(q, k, v, dropout_p, softmax_scale, *mask, *options)
    return _written(out, *results)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    zero_tensors: bool,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: object,
) -> Results:
    """`_flash_attn_varlen_forward`, its output in `out` if given."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    mask = (causal, window_size_left, window_size_right)
    options = (softcap, alibi_slopes, return_softmax)
    inputs = (q, k, v, *lengths, dropout_p, softmax_scale, *mask, *options)
    results = interface._flash_attn_varlen_forward(
        *inputs, block_table=block_table, leftpad_k=leftpad_k, seqused_k=seqused_k
    )
    return _written(out, *results)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: object,
    rng_state: Tensor | None,
) -> Results:
    """`_flash_attn_backward`: dq, dk and dv, made if they are None, and an empty tensor."""
    dq, dk, dv = _grads((dq, q), (dk, k), (dv, v))
    inputs = (dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale)
    options = (causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic)
    return dq, dk, dv, interface._flash_attn_backward(*inputs, *options)


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    zero_tensors: bool,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: object,
    rng_state: Tensor | None,
) -> Results:
    """`_flash_attn_varlen_backward`, as `bwd`."""
    dq, dk, dv = _grads((dq, q), (dk, k), (dv, v))
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs = (dout, q, k, v, out, softmax_lse, dq, dk, dv, *lengths, dropout_p, softmax_scale)
    options = (causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic)
    return dq, dk, dv, interface._flash_attn_varlen_backward(*inputs, *options)


def fwd_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_with_kvcache` and its LSE, its output in `out` if given."""
    with torch.no_grad():
        result, lse = interface.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_seqlens,
            cache_batch_idx,
            cache_leftpad,
            block_table,
            softmax_scale,
            causal,
            (window_size_left, window_size_right),
            softcap,
            rotary_interleaved,
            alibi_slopes,
            num_splits,
            return_softmax_lse=True,
        )
    return _written(out, result)[0], lse


def _written(out: Tensor | None, result: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    if out is not None:
        check_output(out, result.shape, result)
        with torch.no_grad():
            result = out.copy_(result)
    return result, *others


def _grads(*pairs: tuple[Tensor | None, Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) if grad is None else grad for grad, x in pairs)
