"""FlashAttention-2's module `flash_attn.flash_attn_interface`.

Its functions with their names, order and results, on those of this package. The four whose names
begin with an underscore are what context parallelism calls (ring-flash-attention and diffusers, for
two): they have no gradient of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import cute_kernels
from cute_kernels.checks import check_tensor
from cute_kernels.compat.operators import (
    Sequences,
    backward,
    longest,
    rows_contiguous,
    without_gradient,
)
from cute_kernels.compat.variants import variant_of
from cute_kernels.varlen_checks import check_int32

Window = tuple[int, int]
_MULTIPLE = 8  # of head dims; others are padded, as FlashAttention-2 does


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`cute_kernels.flash_attn_func` with FlashAttention-2's arguments.

    Args:
        dropout_p, alibi_slopes: (heads,) or (batch, heads), float32, without a gradient: calls with
            these run on variants (docs/variants.md), which compile at first use, and have no
            block_table.
        return_attn_probs: also return the LSE, and an empty tensor in place of probabilities.

    Head dims that are no multiple of 8 are padded.
    """
    inputs = _padded(q, k, v)
    variant = variant_of(q, dropout_p, alibi_slopes, softcap)
    out, lse = cute_kernels.flash_attn_func(
        *inputs,
        variant=variant,
        softmax_scale=_scale(q, softmax_scale),
        causal=causal,
        window_size=window_size,
        softcap=0.0 if variant else softcap,
        deterministic=deterministic,
        return_lse=True,
    )
    return _results(out, lse, v, return_attn_probs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *inputs: Any, **options: Any) -> Any:
    """`flash_attn_func` of kv: (batch, seqlen_k, 2, key heads, head_dim)."""
    k, v = _apart("kv", kv, 2, 5)
    return flash_attn_func(q, k, v, *inputs, **options)


def flash_attn_qkvpacked_func(qkv: Tensor, *inputs: Any, **options: Any) -> Any:
    """`flash_attn_func` of qkv: (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = _apart("qkv", qkv, 3, 5)
    return flash_attn_func(q, k, v, *inputs, **options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`cute_kernels.flash_attn_varlen_func` with FlashAttention-2's arguments, see
    `flash_attn_func`.

    Args:
        block_table: (batch, pages), of k and v in pages, (pages, page size, key heads, head_dim).
    """
    inputs = _padded(q, k, v)
    is_paged = block_table is not None
    if is_paged:
        _refuse("flash_attn_varlen_func with block_table", dropout_p, alibi_slopes)
    variant = variant_of(q, dropout_p, alibi_slopes, softcap)
    attend: Callable[..., Any] = cute_kernels.flash_attn_varlen_func
    out, lse = (partial(without_gradient, attend) if is_paged else attend)(
        *inputs,
        cu_seqlens_q,
        None if is_paged else cu_seqlens_k,
        longest(max_seqlen_q),
        longest(max_seqlen_k),
        softmax_scale=_scale(q, softmax_scale),
        causal=causal,
        window_size=window_size,
        softcap=0.0 if variant else softcap,
        deterministic=deterministic,
        seqused_k=_keys_of_pages(cu_seqlens_k, q) if is_paged else None,
        page_table=block_table,
        variant=variant,
        return_lse=True,
    )
    return _results(out, lse, v, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *inputs: Any,
    **options: Any,
) -> Any:
    """`flash_attn_varlen_func` of kv: (total_k, 2, key heads, head_dim)."""
    k, v = _apart("kv", kv, 2, 4)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_func(q, k, v, *lengths, *inputs, **options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, *inputs: Any, **options: Any
) -> Any:
    """`flash_attn_varlen_func` of qkv: (total, 3, heads, head_dim)."""
    q, k, v = _apart("qkv", qkv, 3, 4)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *lengths, *inputs, **options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`cute_kernels.flash_attn_with_kvcache` with FlashAttention-2's arguments. Caches whose head
    dim is no multiple of 8 are copied, there and back."""
    _refuse("flash_attn_with_kvcache", 0.0, alibi_slopes)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if x is not None or name not in "kv":
            _check_rows(name, x)
    caches = _wide(k_cache), _wide(v_cache)
    places = rows_contiguous(cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    cache_seqlens, cache_batch_idx, cache_leftpad, block_table = places
    out, lse = without_gradient(
        cute_kernels.flash_attn_with_kvcache,
        _wide(*rows_contiguous(q)),
        *caches,
        *(None if x is None else _wide(x) for x in rows_contiguous(k, v)),
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        page_table=block_table,
        softmax_scale=_scale(q, softmax_scale),
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    for cache, wide in zip((k_cache, v_cache), caches, strict=True):
        if wide is not cache and k is not None:
            with torch.no_grad():
                cache.copy_(wide[..., : cache.shape[-1]])
    out = out[..., : v_cache.shape[-1]]
    return (out, lse) if return_softmax_lse else out


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, LSE, and empty tensors in place of probabilities and the generator's state."""
    _refuse("_flash_attn_forward", dropout_p, alibi_slopes)
    window = (window_size_left, window_size_right)
    options: dict[str, Any] = {"window_size": window, "softcap": softcap, "return_attn_probs": True}
    with torch.no_grad():
        out, lse, nothing = flash_attn_func(q, k, v, 0.0, softmax_scale, causal, **options)
    return out, lse, nothing, torch.empty(0, dtype=torch.int64, device=q.device)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_flash_attn_forward` of packed sequences, and of pages as `flash_attn_varlen_func`. Rows
    that none has are 0 without `zero_tensors`, too."""
    _refuse("_flash_attn_varlen_forward", dropout_p, alibi_slopes)
    if leftpad_k is not None:
        raise NotImplementedError(
            "_flash_attn_varlen_forward: leftpad_k is not there; flash_attn_with_kvcache takes it"
        )
    inputs = _padded(q, k, v)
    is_paged = block_table is not None
    if is_paged and seqused_k is None:
        seqused_k = _keys_of_pages(cu_seqlens_k, q)
    with torch.no_grad():
        out, lse = cute_kernels.flash_attn_varlen_func(
            *inputs,
            cu_seqlens_q,
            None if is_paged else cu_seqlens_k,
            longest(max_seqlen_q),
            longest(max_seqlen_k),
            seqused_k=seqused_k,
            page_table=block_table,
            softmax_scale=_scale(q, softmax_scale),
            causal=causal,
            window_size=(window_size_left, window_size_right),
            softcap=softcap,
            return_lse=True,
        )
    out, lse, nothing = _results(out, lse, v, True)
    return out, lse, nothing, torch.empty(0, dtype=torch.int64, device=q.device)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes the gradients into dq, dk and dv, and returns an empty tensor. Output and LSE may be
    of more keys than k has. Head dims are multiples of 8."""
    _refuse("_flash_attn_backward", dropout_p, alibi_slopes)
    tensors = (dout, q, k, v, out, softmax_lse, (dq, dk, dv), None)
    window = (window_size_left, window_size_right)
    options = (softmax_scale, causal, window, softcap, deterministic)
    backward(*tensors, *options)
    return torch.empty(0, dtype=torch.float32, device=q.device)


def _flash_attn_varlen_backward(
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
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """`_flash_attn_backward` of packed sequences; `zero_tensors` as there."""
    _refuse("_flash_attn_varlen_backward", dropout_p, alibi_slopes)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, None, None, max_seqlen_q, max_seqlen_k)
    tensors = (dout, q, k, v, out, softmax_lse, (dq, dk, dv), sequences)
    window = (window_size_left, window_size_right)
    options = (softmax_scale, causal, window, softcap, deterministic)
    backward(*tensors, *options)
    return torch.empty(0, dtype=torch.float32, device=q.device)


# FlashAttention-2's names of the same as torch operators, which diffusers imports.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _refuse(function: str, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    """What calls without autograd, and of caches, do not take."""
    if dropout_p != 0:
        raise NotImplementedError(
            f"{function}: dropout_p is {dropout_p}, must be 0 here; flash_attn_func takes it"
        )
    if alibi_slopes is not None:
        raise NotImplementedError(
            f"{function}: alibi_slopes is given, must be None here; flash_attn_func takes it"
        )


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors with head dims that the kernels take."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rows(name, x)
    q, k, v = rows_contiguous(q, k, v)
    return _wide(q), _wide(k), _wide(v)


def _keys_of_pages(cu_seqlens_k: Tensor, q: Tensor) -> Tensor:
    """How many a sequence has in pages, where FlashAttention-2 has its cu_seqlens, too."""
    (starts,) = rows_contiguous(cu_seqlens_k)
    check_int32("cu_seqlens_k", starts, q)
    counts: Tensor = starts.diff()
    return counts


def _check_rows(name: str, x: object) -> None:
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dim() == 0:
        raise ValueError(f"{name} has shape (), must have a head_dim")


def _wide(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % _MULTIPLE
    return pad(x, (0, missing)) if missing else x


def _scale(q: Tensor, softmax_scale: float | None) -> float | None:
    """The default is that of the head dim before it is padded."""
    return float(q.shape[-1] ** -0.5) if softmax_scale is None else softmax_scale


def _apart(name: str, packed: Tensor, parts: int, dims: int) -> tuple[Tensor, ...]:
    check_tensor(name, packed)
    if packed.dim() != dims or packed.shape[-3] != parts:
        rows = "(batch, seqlen" if dims == 5 else "(total"
        raise ValueError(
            f"{name} has shape {tuple(packed.shape)}, must be {rows}, {parts}, heads, head_dim)"
        )
    return packed.unbind(-3)


def _results(out: Tensor, lse: Tensor, v: Tensor, with_lse: bool) -> Any:
    out = out[..., : v.shape[-1]]
    return (out, lse, torch.empty(0, dtype=out.dtype, device=out.device)) if with_lse else out
