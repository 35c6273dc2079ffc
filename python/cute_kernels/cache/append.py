"""What is written into a KV cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cute_kernels.cache import operators
from cute_kernels.cache.checks import check_append
from cute_kernels.checks import explain, refuse_derivatives
from cute_kernels.registration import mark_written


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
) -> Tensor:
    """Writes new keys and values into a cache, in place, behind what it holds of each sequence.

    Row i of sequence b becomes row ``cache_seqlens[b] + i`` of its cache. Nothing else is written.

    Args:
        k_cache: (batch_cache, seqlen_cache, key heads, head_dim), or with a page table (pages,
            page_size, key heads, head_dim). On CUDA float16 or bfloat16, on the CPU also float32
            and float64. Any strides with a contiguous last dimension, here and in what follows.
        v_cache: the same with a head_dim of its own. Both may be parts of one tensor.
        k: (batch, seqlen_new, key heads, head_dim), or with cu_seqlens_k_new packed, (total, key
            heads, head_dim); dtype and device of the cache.
        v: likewise, with v_cache's head_dim.
        cache_seqlens: (batch,), int32: how many rows the cache holds of each sequence.
        page_table: (batch, max_pages), int32, last dimension contiguous: row j of a sequence is row
            ``j % page_size`` of page ``page_table[b, j // page_size]``. Only what is needed for the
            new rows is looked at.
        cache_batch_idx: (batch,), int32: in which entry of a cache without pages a sequence is; its
            own number if None.
        cu_seqlens_k_new: (batch + 1,), int32: 0, and where each sequence's part of k and v ends.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), float32 or k's dtype; rotary_dim is a
            multiple of 16 up to head_dim. The first rotary_dim channels of k are rotated in pairs,
            in fp32, by the angles of the position ``cache_seqlens[b] + i``.
        rotary_seqlens: (batch,), int32: positions start here rather than at cache_seqlens.
        rotary_interleaved: pairs are channels 2i and 2i + 1; if False i and i + rotary_dim / 2.

    Returns:
        (batch,), int32: how many rows the cache holds of each sequence now.

    Raises:
        ValueError, TypeError: an argument is not as described. What tensors hold is looked at on
            the CPU only. On CUDA a row for which the cache has no place is not written, and a
            position that the tables do not have makes NaN.
        NotImplementedError: k or v needs a gradient, or ``cache_batch_idx`` with pages.
    """
    refuse_derivatives("append_kv", k, v, k_cache, v_cache)
    places = (cu_seqlens_k_new, page_table, cache_batch_idx)
    rotary = (rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
    queries = (None, None, True)
    return append_rows(k_cache, v_cache, k, v, cache_seqlens, *places, *rotary, *queries)[0]


def append_rows(k_cache: Tensor, v_cache: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The append operator, whose inputs these are."""
    try:
        results: tuple[Tensor, Tensor] = operators.append(k_cache, v_cache, *inputs)
    except (AttributeError, IndexError) as error:
        explain(error, check_append, k_cache, v_cache, *inputs)
    mark_written(k_cache, v_cache)
    return results
