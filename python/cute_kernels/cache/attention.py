"""Attention to a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_kernels.arguments import Window, check_flags, check_hints, window_of
from cute_kernels.cache import operators
from cute_kernels.cache.append import append_rows, rotation_seed
from cute_kernels.cache.checks import ENTRIES, PAGES, check_attention, check_output
from cute_kernels.cache.eight_bits import check_scales
from cute_kernels.cache.metadata import check_metadata
from cute_kernels.cache.starts import starts_of
from cute_kernels.cache.tables import table_of_batch
from cute_kernels.checks import (
    DENSE,
    INTS,
    PACKED,
    check_alone,
    check_layout,
    check_softcap,
    check_softmax_scale,
    check_tensor,
    explain,
    refuse_derivatives,
)
from cute_kernels.chunks import check_chunk
from cute_kernels.registration import mark_written
from cute_kernels.varlen_checks import check_int32

# What the arguments are that most calls leave alone, and what most others do.
_USUAL = (None, (-1, -1))
_USUAL_HINTS = (0.0, 0, 0, 0, False, 0)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    incoherent: bool = False,
    seed: int = 0,
    tree_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries to a cache of keys and values, into which new ones may be written
    first.

    Names, order and meaning of the arguments are those of FlashAttention-3's function of this name.
    Masks are those of `flash_attn_func` with the keys that the cache holds as seqlen_k: the last
    query stands at the last key. Rows of the cache that no sequence uses may be NaN.

    Args:
        q: (batch, seqlen_q, heads, head_dim), or with cu_seqlens_q packed, (total_q, heads,
            head_dim); dtypes and head_dim as of `flash_attn_func`. With a cache of 8 bits float16,
            bfloat16 or float8_e4m3fn.
        k_cache, v_cache, page_table, cache_batch_idx: as of `append_kv`, without qv with v's
            head_dim up to 256; the number of query heads is a multiple of that of key heads. Of
            the page table only what a sequence's rows need is looked at: the rest may be -1 or
            anything.
        k, v, cu_seqlens_k_new, rotary_seqlens: as of `append_kv`. If given, they are appended
            first, in place, and attended to. k and v of 8 bits go with queries of any
            dtype, with rotary of theirs.
        rotary_cos, rotary_sin, rotary_interleaved: as of `append_kv`, only with k and v. Queries
            are rotated too: with `causal`, a window or chunks query i of a sequence by the angles
            of position ``cache_seqlens + i``, otherwise all by those of ``cache_seqlens``.
        cache_seqlens: (batch,), int32, or an int for all: how many rows the cache holds of each
            sequence before k is appended, those of cache_leftpad included. All if None, which goes
            only without k.
        cache_leftpad: (batch,), int32: how many rows at the beginning are no keys.
        cu_seqlens_q: (batch + 1,), int32: 0, and where each sequence's part of q ends.
        max_seqlen_q: at least the longest sequence's number of queries; None if not known.
        softmax_scale, causal, window_size: as of `flash_attn_func`.
        softcap: if not 0, scores become ``softcap * tanh(score / softcap)``.
        scheduler_metadata: what `get_scheduler_metadata` returned; it changes nothing.
        num_splits: into how many parts the keys of a sequence are cut; 0 chooses. A hint, as are
            pack_gqa and sm_margin.
        return_softmax_lse: also return the LSE.
        q_descale: float32, (batch, key heads): what queries are multiplied by, with a cache of 8
            bits.
        k_descale, v_descale, k_scales, v_scales, incoherent, seed: as of `append_kv`, of caches of
            8 bits. Either the descales or the scales are the factors of K and of V.
        attention_chunk: as of `flash_attn_func`.
        qv: of q's shape with v_cache's head_dim, q's dtype: scores are q k + qv v, times
            softmax_scale, whose default is then ``(q's head_dim + v's) ** -0.5``. This is latent
            attention, whose values are keys too: head_dim is up to 64 then and v's up to 512.
            16-bit caches on CUDA; with rotary_cos only q is rotated.
        sinks: (heads,), float32, float16 or bfloat16: a score for each head, not scaled, that takes
            part in the softmax without a value; the LSE includes it.
        out: where the output is to be: of its shape, and q's dtype, in memory that none of the
            other tensors has.
        tree_mask: int64, of q's shape before heads: bit j of a query says whether it sees new token
            j of its sequence, the last keys, as many as there are queries, at most 64. What masks
            hide stays hidden; all keys before them are seen as without it.

    Returns:
        The output in q's dtype, for float8_e4m3fn in bfloat16, (batch, seqlen_q, heads, v's
        head_dim) or (total_q, heads, v's head_dim), and if asked for the LSE, natural logarithms in
        float32 (float64 for float64 inputs): (batch, heads, seqlen_q), a view of the operator's
        (heads, batch * seqlen_q), or (heads, total_q). A query that sees no key gets 0, and as LSE
        -inf or its head's sink.

    Raises:
        ValueError, TypeError: an argument is not as described. What tensors hold is looked at on
            the CPU only.
        NotImplementedError: an argument whose feature is not there yet, or a tensor that needs a
            gradient.
    """
    refuse_derivatives(
        "flash_attn_with_kvcache",
        *(q, k_cache, v_cache, k, v, qv, sinks, out, rotary_cos, rotary_sin),
        *(q_descale, k_descale, v_descale, k_scales, v_scales),
    )
    if type(causal) is not bool or type(rotary_interleaved) is not bool:
        check_flags(causal=causal, rotary_interleaved=rotary_interleaved)
    rotation = left = right = None
    options: tuple[Any, ...] = ()  # each that is passed costs time
    hints = (softcap, num_splits, sm_margin, attention_chunk, incoherent, seed)
    try:
        hinted = hints != _USUAL_HINTS
        unusual = hinted or (pack_gqa, window_size) != _USUAL
    except (ValueError, RuntimeError):  # arrays do not compare to one answer
        hinted = unusual = True
    if unusual:
        check_hints(num_splits, pack_gqa, sm_margin)
        causal, left, right = window_of(window_size, causal)
        options = (left, right)
    if hinted:
        rotation = rotation_seed(incoherent, seed)
        if not isinstance(softcap, (int, float)):  # as softmax_scale
            check_softcap(softcap)
        check_chunk(attention_chunk)
        options = (left, right, softcap, num_splits, sm_margin, rotation, attention_chunk)
    if scheduler_metadata is not None:
        check_metadata(scheduler_metadata)
    check_tensor("q", q)
    dense = cu_seqlens_q is None
    if q.dim() != (4 if dense else 3):
        check_alone("q", q, DENSE if dense else PACKED)
    if cu_seqlens_q is None:
        batch, max_seqlen_q, *_ = q.shape
        starts = starts_of(batch, max_seqlen_q, q)
    else:
        check_int32("cu_seqlens_q", cu_seqlens_q, q)
        batch, starts = cu_seqlens_q.shape[0] - 1, cu_seqlens_q
    if cache_batch_idx is not None and page_table is not None:
        page_table = table_of_batch(page_table, cache_batch_idx, k_cache, batch)
        cache_batch_idx = None
    if rotary_cos is None:
        rotary_seqlens = None  # FlashAttention-3 does not look at it then
    lengths = cache_seqlens
    if not isinstance(lengths, Tensor):
        lengths = _lengths(cache_seqlens, batch, k_cache, page_table)
    if k is not None and v is not None:
        if cache_seqlens is None:
            raise ValueError("cache_seqlens is None, must be given with k and v")
        rotary = (rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
        places = (cu_seqlens_k_new, page_table, cache_batch_idx)
        queries: tuple[Any, ...] = (None, None, True)
        if rotary_cos is not None:
            moves = causal or left is not None or right is not None or attention_chunk > 0
            queries = (q, cu_seqlens_q, moves)
        inputs = (lengths, *places, *rotary, *queries)
        factors = (k_descale, v_descale, k_scales, v_scales, rotation)
        lengths, turned = append_rows(k_cache, v_cache, k, v, *inputs, factors=factors)
        if rotary_cos is not None:
            q = turned
    elif not (
        k is None
        and v is None
        and cu_seqlens_k_new is None
        and rotary_cos is None
        and rotary_sin is None
    ):
        _refuse_without_new_keys(
            k=k,
            v=v,
            cu_seqlens_k_new=cu_seqlens_k_new,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_seqlens=rotary_seqlens,
        )
    into = None
    if out is not None:
        check_tensor("out", out)
        check_tensor("v_cache", v_cache)
        expected = (*q.shape[:-1], v_cache.shape[-1])
        if out.shape != expected:  # flat, they may be the same
            raise ValueError(f"out has shape {tuple(out.shape)}, must be {expected}")
        if out.is_contiguous():
            into = out.flatten(0, 1) if dense else out
    result, lse = attend(
        into,
        q.flatten(0, 1) if dense else q,
        k_cache,
        v_cache,
        starts,
        lengths,
        page_table,
        cache_batch_idx,
        cache_leftpad,
        sinks,
        softmax_scale,
        causal,
        q_descale,
        _one_of("k", k_descale, k_scales, k_cache),
        _one_of("v", v_descale, v_scales, v_cache),
        None if tree_mask is None else _of_queries(tree_mask, q),
        None if qv is None else _packed_like(qv, q, v_cache),
        max_seqlen_q,
        *options,
    )
    if dense:
        result = result.view(*q.shape[:3], result.shape[2])
    if out is not None and into is None:
        check_output(out, result.shape, result)
        result = out.copy_(result)
    elif out is not None:
        result = out
    if not return_softmax_lse:
        return result
    return result, lse.view(q.shape[2], *q.shape[:2]).transpose(0, 1) if dense else lse


def attend(
    into: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    tree_mask: Tensor | None,
    qv: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The attention operator, with softmax_scale's default and sinks of any dtype; its output is
    written to `into`, packed and dense, if given. Keyword-only inputs go by position."""
    if qv is not None:
        check_tensor("qv", qv)
        check_layout("qv", qv, PACKED)
    if isinstance(softmax_scale, Tensor):  # the operator would read it, and wait for a GPU
        check_softmax_scale(softmax_scale)
    if softmax_scale is None:
        check_tensor("q", q)
        head_dim = (q.shape[-1] if q.dim() else 0) + (0 if qv is None else qv.shape[-1])
        softmax_scale = head_dim**-0.5 if head_dim else 1.0
    if sinks is not None:
        check_tensor("sinks", sinks)
        if not sinks.dtype.is_floating_point:
            raise TypeError(f"sinks has dtype {sinks.dtype}, must be float32, float16 or bfloat16")
        sinks = sinks.float()
    places = (cache_seqlens, page_table, cache_batch_idx, cache_leftpad)
    more = (softmax_scale, causal, q_descale, k_descale, v_descale, tree_mask, qv, *options)
    inputs = (q, k_cache, v_cache, cu_seqlens_q, *places, sinks, *more)
    try:
        if into is None:
            result: tuple[Tensor, Tensor] = operators.attention(*inputs)
            return result
        lse: Tensor = operators.attention_out(into, *inputs)
    except (AttributeError, IndexError):
        explain(check_attention, *inputs)
        raise
    mark_written(into)
    return into, lse


def _one_of(
    which: str, descale: Tensor | None, scales: Tensor | None, cache: Tensor
) -> Tensor | None:
    """The factors of K or V. The operator calls both descales."""
    if scales is None:
        return descale
    check_tensor(f"{which}_cache", cache)
    check_scales(f"{which}_scales", scales, cache, descale)
    return scales


def _of_queries(tree_mask: Tensor, q: Tensor) -> Tensor:
    """The operator's (total_q,)."""
    check_tensor("tree_mask", tree_mask)
    if tree_mask.shape != q.shape[:-2]:
        raise ValueError(
            f"tree_mask has shape {tuple(tree_mask.shape)}, must be {tuple(q.shape[:-2])} like q "
            "before heads"
        )
    return tree_mask.flatten()


def _packed_like(qv: Tensor, q: Tensor, v_cache: Tensor) -> Tensor:
    """The operator's (total_q, heads, v_cache's head_dim)."""
    check_tensor("qv", qv)
    check_tensor("v_cache", v_cache)
    expected = (*q.shape[:-1], v_cache.shape[-1])
    if qv.shape != expected:
        raise ValueError(
            f"qv has shape {tuple(qv.shape)}, must be {expected}: q's, with v_cache's head_dim"
        )
    return qv.flatten(0, -3)


def _lengths(
    cache_seqlens: int | Tensor | None, batch: int, k_cache: Tensor, page_table: Tensor | None
) -> Tensor:
    """As a tensor, if it is not one; all that the cache can hold if None."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    check_tensor("k_cache", k_cache)
    if cache_seqlens is None:
        check_layout("k_cache", k_cache, ENTRIES if page_table is None else PAGES)
        cache_seqlens = k_cache.shape[1]
        if page_table is not None:
            check_int32("page_table", page_table, k_cache, dims=2, like="k_cache")
            cache_seqlens *= page_table.shape[1]
        if not isinstance(cache_seqlens, torch.SymInt) and cache_seqlens >= 2**31:
            raise ValueError(
                f"cache_seqlens is None, must be given: the cache has room for {cache_seqlens} "
                "rows of a sequence, not below 2^31"
            )
    elif isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, INTS):
        raise TypeError(f"cache_seqlens is {cache_seqlens!r}, must be a torch.Tensor, int or None")
    elif not isinstance(cache_seqlens, torch.SymInt) and not 0 <= cache_seqlens < 2**31:
        raise ValueError(f"cache_seqlens is {cache_seqlens}, must be at least 0 and below 2^31")
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=k_cache.device)


def _refuse_without_new_keys(**arguments: object) -> None:
    """Those that go only with k and v."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is given, must be None unless both k and v are given")
