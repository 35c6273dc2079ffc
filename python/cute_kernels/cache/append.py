"""What is written into a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_kernels.cache import operators
from cute_kernels.cache.checks import check_append
from cute_kernels.cache.eight_bits import DTYPES, E4M3
from cute_kernels.cache.tables import table_of_batch
from cute_kernels.checks import check_flag, check_seed, check_tensor, explain, refuse_derivatives
from cute_kernels.fp8.rotation import signed
from cute_kernels.registration import mark_written
from cute_kernels.varlen_checks import check_int32


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    incoherent: bool = False,
    seed: int = 0,
) -> Tensor:
    """Writes new keys and values into a cache, in place, behind what it holds of each sequence.

    Row i of sequence b becomes row ``cache_seqlens[b] + i`` of its cache. Nothing else is written.

    Args:
        k_cache: (batch_cache, seqlen_cache, key heads, head_dim), or with a page table (pages,
            page_size, key heads, head_dim). On CUDA float16 or bfloat16, on the CPU also float32
            and float64; or of 8 bits, float8_e4m3fn or int8, with a head_dim that is a multiple of
            16. Any strides with a contiguous last dimension, here and in what follows.
        v_cache: the same with a head_dim of its own. Both may be parts of one tensor.
        k: (batch, seqlen_new, key heads, head_dim), or with cu_seqlens_k_new packed, (total, key
            heads, head_dim); device of the cache and its dtype. For 8 bits also one of the others;
            numbers of 8 bits are stored as they are, without scales and `incoherent`, and strides
            of all four tensors are multiples of 2 then. Rotary rounds them again.
        v: likewise, with v_cache's head_dim.
        cache_seqlens: (batch,), int32: how many rows the cache holds of each sequence.
        page_table: (batch, max_pages), int32, last dimension contiguous: row j of a sequence is row
            ``j % page_size`` of page ``page_table[b, j // page_size]``. Only what is needed for the
            new rows is looked at.
        cache_batch_idx: (batch,), int32: in which entry of a cache without pages a sequence is, or
            which row of page_table is its own, whose batch may be another then; its own number if
            None.
        cu_seqlens_k_new: (batch + 1,), int32: 0, and where each sequence's part of k and v ends.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), float32 or k's dtype, for one of 8 bits
            also float16; rotary_dim is a multiple of 16 up to head_dim. The first rotary_dim
            channels of k are rotated in pairs, in fp32, by the angles of the position
            ``cache_seqlens[b] + i``.
        rotary_seqlens: (batch,), int32: positions start here rather than at cache_seqlens.
        rotary_interleaved: pairs are channels 2i and 2i + 1; if False i and i + rotary_dim / 2.
        k_descale, v_descale: float32, of caches of 8 bits: what their numbers are multiplied by to
            become keys and values; 1 if None. (batch, key heads), or (pages, page_size, key heads),
            where page_size may be 1: one for all rows of a page. Numbers are rounded, and saturated
            at 448 or from -128 to 127.
        k_scales, v_scales: instead of these, float32, (pages, page_size, key heads): factors of
            each row, which are written with it: its largest magnitude over 448 or 127, and 0 for
            a row without an element of 2^-100. For `k_descale` of attention.
        incoherent: keys are rotated, after rotary, by a Hadamard matrix with random signs from
            `seed`, which spreads outliers over all channels before they are rounded: queries of
            `flash_attn_with_kvcache(..., incoherent=True, seed=seed)` meet them. Caches of 8 bits
            whose head_dim is a power of 2 only.
        seed: at least 0 and below 2^64.

    Returns:
        (batch,), int32: how many rows the cache holds of each sequence now.

    Raises:
        ValueError, TypeError: an argument is not as described. What tensors hold is looked at on
            the CPU only. On CUDA a row for which the cache has no place is not written, and a
            position that the tables do not have makes NaN.
        NotImplementedError: a tensor needs a gradient; a cache of another type of 8 bits.
    """
    factors = (k_descale, v_descale, k_scales, v_scales)
    refuse_derivatives("append_kv", k, v, k_cache, v_cache, rotary_cos, rotary_sin, *factors)
    check_flag("rotary_interleaved", rotary_interleaved)
    if cache_batch_idx is not None and page_table is not None:
        check_tensor("k_cache", k_cache)
        check_int32("cache_seqlens", cache_seqlens, k_cache, like="k_cache")
        batch = cache_seqlens.shape[0]
        page_table = table_of_batch(page_table, cache_batch_idx, k_cache, batch)
        cache_batch_idx = None
    places = (cu_seqlens_k_new, page_table, cache_batch_idx)
    rotary = (rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
    queries = (None, None, True)
    inputs = (cache_seqlens, *places, *rotary, *queries)
    of_eight_bits = (*factors, rotation_seed(incoherent, seed))
    return append_rows(k_cache, v_cache, k, v, *inputs, factors=of_eight_bits)[0]


def rotation_seed(incoherent: bool, seed: int) -> int | None:
    """As operators take it, which have no unsigned numbers."""
    check_flag("incoherent", incoherent)
    check_seed(seed)
    return signed(seed) if incoherent else None


NO_FACTORS = (None,) * 5


def append_rows(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *inputs: Any,
    factors: tuple[Any, ...] = NO_FACTORS,
) -> tuple[Tensor, Tensor]:
    """The append operator, whose inputs these are; `factors` are those of caches of 8 bits."""
    if inputs[4] is not None and getattr(k, "dtype", None) in DTYPES:
        return _append_turned(k_cache, v_cache, k, v, *inputs, factors=factors)
    return _append(k_cache, v_cache, k, v, *inputs, factors=factors)


def _append(
    k_cache: Tensor, v_cache: Tensor, *inputs: Any, factors: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    if any(x is not None for x in factors):
        inputs = (*inputs, *factors)
    try:
        results: tuple[Tensor, Tensor] = operators.append(k_cache, v_cache, *inputs)
    except (AttributeError, IndexError):
        explain(check_append, k_cache, v_cache, *inputs)
        raise
    mark_written(k_cache, v_cache, *factors[2:4])
    return results


def _append_turned(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *inputs: Any,
    factors: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """The same where rotary turns numbers of 8 bits: as float16, which holds them all, rounded to 8
    bits again behind it. Factors say what they mean, and change nothing."""
    *places, cos, sin, seqlens, interleaved, q, starts, moves = inputs
    *descales, k_scales, v_scales, rotation = factors
    dtype = k.dtype
    if isinstance(q, Tensor) and q.dtype != dtype:
        raise TypeError(f"q has dtype {q.dtype}, must be {dtype} like k with rotary_cos")
    alike = all(
        getattr(x, "dtype", None) == dtype for x in (k_cache, v_cache, v, k if q is None else q)
    )
    if not alike or any(x is not None for x in (k_scales, v_scales, rotation)):  # refused
        return _append(k_cache, v_cache, k, v, lengths, *inputs, factors=factors)

    def wide(x: Any) -> Any:
        return x.half() if getattr(x, "dtype", None) == dtype else x

    rotary = (wide(cos), wide(sin), seqlens, interleaved)
    queries = (wide(q), starts, moves)
    inputs = (wide(k), wide(v), lengths, *places, *rotary, *queries)
    check_append(k_cache, v_cache, *inputs, *descales)
    lengths, turned = _append(k_cache, v_cache, *inputs, factors=NO_FACTORS)
    most = torch.finfo(E4M3).max
    return lengths, turned if q is None else turned.clamp(-most, most).to(dtype)
