"""Attention of sequences that lie one behind the other, without padding."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from cute_kernels.arguments import (
    Window,
    check_flags,
    check_hints,
    refuse_for_fp8,
    refuse_with_variant,
    window_of,
)
from cute_kernels.autograd import varlen
from cute_kernels.cache.pages import attend_pages
from cute_kernels.checks import check_softcap, check_tensor, explain
from cute_kernels.chunks import Lengths, check_chunk, in_chunks
from cute_kernels.fp8 import flash_attn_varlen_e4m3
from cute_kernels.variants.attention import Packed, attend
from cute_kernels.variants.variant import BoundVariant, Variant
from cute_kernels.varlen_checks import (
    check_contents,
    check_lengths,
    check_max_seqlens,
    check_varlen_forward,
)

_is_compiling = torch.compiler.is_compiling
_E4M3 = torch.float8_e4m3fn
_always_deterministic = torch.are_deterministic_algorithms_enabled

# What the arguments are that most calls leave alone.
_USUAL = ((-1, -1), 0, 0.0, 1, None, 0)

# On CUDA the contents of cu_seqlens and seqused are read only if asked for: it waits for the GPU.
_CHECK_CONTENTS = os.environ.get("CUTE_KERNELS_CHECK") == "1"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    page_table: Tensor | None = None,
    tree_mask: Tensor | None = None,
    tile_config: str | None = None,
    variant: Variant | BoundVariant | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention inside each of several packed sequences.

    Names and order of the arguments are those of FlashAttention-3's function of this name.
    Sequence i has a slot of rows, ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``, and uses the first
    ``seqused[i]`` of them, without `seqused` all. Masks are those of `flash_attn_func` with the
    used lengths as seqlen_q and seqlen_k. Other rows are not read.

    Args:
        q: (total_q, heads, head_dim), dtypes, head_dim and strides as of `flash_attn_func`.
        k: (total_k, key heads, head_dim), dtype and device of q.
        v: (total_k, key heads, v's head_dim), dtype and device of q; v's head_dim is a multiple
            of 8 up to 256.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32, on q's device: 0, and where each slot of q
            and of k ends. Not decreasing, and at most total_q and total_k.
        max_seqlen_q, max_seqlen_k: at least what the longest sequence uses; None if not known.
        seqused_q, seqused_k: (batch,), int32, on q's device: how many rows of its slot a sequence
            uses; all if None.
        softmax_scale, causal, window_size, attention_chunk, softcap: as of `flash_attn_func`.
        deterministic, return_attn_probs, sinks, return_lse, tile_config, variant: likewise.
        q_descale, k_descale, v_descale: for q, k and v of float8_e4m3fn, what they are to be
            multiplied by: (batch, key heads), float32; 1 if None. Such a call takes head dims that
            are multiples of 16, returns bfloat16, has no softcap and no gradient, or a page_table.
            From 16-bit tensors, `flash_attn_fp8_varlen_func` loses less.
        qv: with page_table, as of `flash_attn_with_kvcache`; else not there yet.
        num_splits, pack_gqa: hints, which change no result.
        sm_margin: as of `flash_attn_func`.
        page_table: (batch, max_pages), int32, last dimension contiguous. With it k and v are caches
            of pages, (pages, page_size, key heads, head_dim), and key j of a sequence is row ``j %
            page_size`` of page ``page_table[i, j // page_size]``; cu_seqlens_k is None, seqused_k
            is required, and there is no gradient. Only what the used keys need
            of the table is looked at. Pages may be of 8 bits: dtypes and descales are as of
            `flash_attn_with_kvcache`, as is tree_mask, which goes without seqused_q.

    Returns:
        The output, (total_q, heads, v's head_dim) in q's dtype, contiguous, and if asked for the
        LSE: (heads, total_q), float32 (float64 for float64 inputs). A query that sees no key and a
        row of q that no sequence uses get 0 and -inf, and have no gradient; with sinks the former
        has its sink as its LSE. Gradients are those of `flash_attn_func`.

    Raises:
        ValueError, TypeError: an argument is not as described. What cu_seqlens and seqused hold is
            looked at on the CPU only, and on CUDA, where that waits for the GPU, if the environment
            had ``CUTE_KERNELS_CHECK=1`` when the package was imported.
        RuntimeError: the GPU is not of compute capability 9.0, or the build has no kernel for it.
        NotImplementedError: an argument whose feature is not there yet, ``torch.func.vmap``, a
            second derivative, or a forward-mode one.
    """
    if type(causal) is not bool or type(deterministic) is not bool:
        check_flags(causal=causal, deterministic=deterministic)
    window: list[int | None] = [None, None]
    # By identity: a tensor takes twenty microseconds to say that it does not equal None.
    plain = variant is None and qv is sinks is page_table is tree_mask is None
    plain = plain and q_descale is k_descale is v_descale is None
    asked = (window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin)
    is_e4m3 = getattr(q, "dtype", None) is _E4M3
    try:
        hinted = asked != _USUAL
    except (ValueError, RuntimeError):  # arrays do not compare to one answer
        hinted = True
    unusual = hinted or not plain or is_e4m3
    if unusual:
        if qv is not None and page_table is None:
            raise NotImplementedError(
                "flash_attn_varlen_func: qv is not there yet without page_table"
            )
        if tree_mask is not None and page_table is None:
            raise ValueError("tree_mask is given, must be None without page_table")
        check_hints(num_splits, pack_gqa, sm_margin)
        causal, *window = window_of(window_size, causal)
        check_softcap(softcap)  # of a tensor as max_seqlen below
        check_chunk(attention_chunk)
    if variant is not None:
        refuse_with_variant(
            softcap=softcap > 0,
            attention_chunk=attention_chunk > 0,
            page_table=page_table is not None,
        )
    # Here too: the operator would read a tensor, and wait for the GPU.
    if type(max_seqlen_q) is not int or type(max_seqlen_k) is not int:
        check_max_seqlens(max_seqlen_q, max_seqlen_k)
    descales = (q_descale, k_descale, v_descale)
    is_fp8 = unusual and (is_e4m3 or any(x is not None for x in descales))
    if page_table is not None:
        out, lse = attend_pages(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            seqused_q,
            seqused_k,
            softmax_scale,
            causal,
            window[0],
            window[1],
            softcap,
            num_splits,
            sm_margin,
            sinks,
            page_table,
            tile_config,
            q_descale,
            k_descale,
            v_descale,
            tree_mask,
            attention_chunk,
            qv,
        )
        return (out, lse) if return_lse or return_attn_probs else out
    if cu_seqlens_k is None:
        raise TypeError("cu_seqlens_k is a NoneType, must be a torch.Tensor")
    lengths: Lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, None)
    checks_contents = _CHECK_CONTENTS and not _is_compiling() and getattr(q, "is_cuda", False)
    if checks_contents and (is_fp8 or variant is not None):
        check_tensor("k", k)
        check_lengths(q, *lengths)
        check_contents(q, k, *lengths[:4], max_seqlen_q, max_seqlen_k)
    if is_fp8:
        if tile_config is not None:
            raise ValueError(f"tile_config is {tile_config!r}, must be None for float8_e4m3fn")
        refuse_for_fp8(softcap=softcap > 0, variant=variant is not None)
        out, lse = flash_attn_varlen_e4m3(
            q,
            k,
            v,
            (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k),
            (max_seqlen_q, max_seqlen_k),
            descales,
            softmax_scale,
            (causal, window[0], window[1]),
            attention_chunk,
            sinks,
            return_lse or return_attn_probs,
            sm_margin,
        )
        return (out, lse) if return_lse or return_attn_probs else out
    if variant is not None:
        of_call = Packed(
            cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k
        )
        deterministic = _always_deterministic() or deterministic
        call = (q, k, v, of_call, softmax_scale, causal, sinks, window[0], window[1])
        out, lse = attend(variant, *call, deterministic, tile_config, sm_margin)
        return (out, lse) if return_lse or return_attn_probs else out
    if unusual and attention_chunk > 0:
        check_varlen_forward(q, k, v, *lengths, 1.0, causal, sinks)
        if not q.is_cuda and not _is_compiling() and type(cu_seqlens_q) is Tensor:
            # Not of the chunks, as the operator would: of what the caller gave.
            check_contents(q, k, *lengths[:4], max_seqlen_q, max_seqlen_k)
        lengths = in_chunks(attention_chunk, k.shape[0], max_seqlen_k, *lengths[:4])
    try:
        forward, softmax_scale = varlen.choose(q, k, v, softmax_scale, sinks)
        if checks_contents:
            given = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)  # lengths may be of chunks
            check_contents(q, k, *given, max_seqlen_q, max_seqlen_k)
    except (AttributeError, IndexError, ZeroDivisionError, RuntimeError):
        explain(check_varlen_forward, q, k, v, *lengths, 1.0, causal, sinks)
        raise
    options: tuple[Any, ...] = (max_seqlen_q, max_seqlen_k)
    deterministic = _always_deterministic() or deterministic
    if hinted or deterministic or tile_config is not None:  # others cost a call time, too
        options = (*options, *window, deterministic, tile_config, softcap, sm_margin)
    out, lse = forward(q, k, v, *lengths, softmax_scale, causal, sinks, *options)
    return (out, lse) if return_lse or return_attn_probs else out
