"""What a call of the operators of this folder may look like, see cute_kernels/checks.py.

The contents of tensors are left to reference.py: on CUDA nobody looks at them, and what they name
that does not exist is neither read nor written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cute_kernels.cache.eight_bits import (
    E4M3,
    check_cache,
    check_factors,
    check_scales,
    check_stored,
    check_tree,
    holds_eight_bits,
    output_dtype,
)
from cute_kernels.cache.latent import MAX_LATENT_DIM, check_latent
from cute_kernels.cache.rotary_checks import check_tables
from cute_kernels.checks import (
    DENSE,
    HEAD_DIM_MULTIPLE,
    MAX_HEAD_DIM,
    PACKED,
    ROWS_LIMIT,
    check_alone,
    check_device,
    check_flag,
    check_int,
    check_layout,
    check_like,
    check_sm_margin,
    check_softcap,
    check_softmax_scale,
    check_tensor,
    check_vectors,
    check_window,
)
from cute_kernels.reference import accumulator_dtype
from cute_kernels.varlen_checks import check_int32

NEW = ("batch", "seqlen_new", "key heads", "head_dim")
PAGES = ("pages", "page_size", "key heads", "head_dim")
ENTRIES = ("batch_cache", "seqlen_cache", "key heads", "head_dim")

_OTHER_EIGHT_BITS = (torch.float8_e5m2, torch.uint8)


def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    causal: bool,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    tree_mask: Tensor | None = None,
    qv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    sm_margin: int = 0,
    rotation_seed: int | None = None,
    attention_chunk: int = 0,
) -> None:
    """Raises ValueError, TypeError or NotImplementedError unless the attention operator can answer
    this call."""
    check_flag("causal", causal)
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _refuse_other_eight_bits(name, tensor)
    _check_attending(q, k_cache)
    _check_head_dim("q", q)
    most_v = MAX_HEAD_DIM if qv is None else MAX_LATENT_DIM
    _check_caches(k_cache, v_cache, page_table, q, "q", most_v)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_vectors(name, cache)
    heads, head_dim = q.shape[1:]
    if k_cache.shape[3] != head_dim:
        raise ValueError(f"k_cache has head_dim {k_cache.shape[3]}, must be {head_dim} like q")
    key_heads = k_cache.shape[2]
    if heads != 0 and (key_heads == 0 or heads % key_heads != 0):
        raise ValueError(f"q has {heads} heads, must be a multiple of k_cache's {key_heads}")
    check_int32("cu_seqlens_q", cu_seqlens_q, q)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q has shape (0,), must be (batch + 1,)")
    check_int32("cache_seqlens", cache_seqlens, q)
    batch = cu_seqlens_q.shape[0] - 1
    _check_batch("cache_seqlens", cache_seqlens, batch)
    _check_places(k_cache, page_table, cache_batch_idx, cache_leftpad, batch, q, "q")
    if sinks is not None:
        check_device("sinks", sinks, q)
        if sinks.dtype != torch.float32:
            raise TypeError(f"sinks has dtype {sinks.dtype}, must be torch.float32")
        if sinks.shape != (heads,):
            raise ValueError(f"sinks has shape {tuple(sinks.shape)}, must be (heads,) = ({heads},)")
    check_softmax_scale(softmax_scale, accumulator_dtype(q.dtype))
    check_int("max_seqlen_q", max_seqlen_q, least=0)
    check_window(window_left, window_right)
    check_softcap(softcap, accumulator_dtype(q.dtype))
    check_int("num_splits", num_splits, least=0, none="")
    check_sm_margin(sm_margin)
    check_int("attention_chunk", attention_chunk, least=0, none="")
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    check_factors(k_cache, batch, descales, rotation_seed, "q_descale")
    if tree_mask is not None:
        check_tree(tree_mask, q)
    if qv is not None:
        check_latent(qv, q, v_cache)


def check_attention_out(out: Tensor, q: Tensor, *inputs: Any, **options: Any) -> None:
    """The same of the operator that writes its output into `out`."""
    check_attention(q, *inputs, **options)
    v_cache = inputs[1]
    check_output(out, (*q.shape[:2], v_cache.shape[3]), q, output_dtype(q))
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}, must be contiguous")
    check_vectors("out", out)


def check_output(
    out: Tensor, shape: Sequence[int], q: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`dtype`: q's if None."""
    check_device("out", out, q)
    dtype = dtype or q.dtype
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}, must be {dtype}")
    if out.shape != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, must be {tuple(shape)}")


def check_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_k_new: Tensor | None,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
    q: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    q_advance: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation_seed: int | None = None,
) -> None:
    """The same of the append operator."""
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        _refuse_other_eight_bits(name, tensor)
    layout = NEW if cu_seqlens_k_new is None else PACKED
    check_tensor("k", k)
    check_tensor("k_cache", k_cache)
    stored = holds_eight_bits(k)
    check_new = check_layout if stored else check_alone
    check_new("k", k, layout)
    check_like("v", v, k, "k")
    check_new("v", v, layout)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}, must be {tuple(k.shape)} like k but for head_dim"
        )
    most_v = MAX_HEAD_DIM if holds_eight_bits(k_cache) else MAX_LATENT_DIM
    if stored and k.dtype != k_cache.dtype:
        wider = "wider or " if holds_eight_bits(k_cache) else ""
        raise TypeError(f"k has dtype {k.dtype}, must be {wider}{k_cache.dtype} like k_cache")
    _check_caches(k_cache, v_cache, page_table, k, "k", most_v)
    if stored:
        check_stored(
            {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache},
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            k_scales=k_scales,
            v_scales=v_scales,
            incoherent=rotation_seed,
        )
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.shape[-2:] != cache.shape[-2:]:
            raise ValueError(
                f"{name} has (key heads, head_dim) {tuple(x.shape[-2:])}, must be "
                f"{tuple(cache.shape[-2:])} like {name}_cache"
            )
    check_int32("cache_seqlens", cache_seqlens, k, like="k")
    batch = cache_seqlens.shape[0]
    _check_rows("cache_seqlens", cache_seqlens, batch)
    _check_rows("k", k, math.prod(k.shape[:-2]))
    if cu_seqlens_k_new is None:
        if k.shape[0] != batch:
            raise ValueError(f"k has batch {k.shape[0]}, must be {batch} like cache_seqlens")
    else:
        _check_starts("cu_seqlens_k_new", cu_seqlens_k_new, batch, k, "k")
    _check_places(k_cache, page_table, cache_batch_idx, None, batch, k, "k")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must both be given, or neither")
    if rotary_cos is not None and rotary_sin is not None:
        check_tables(rotary_cos, rotary_sin, k, "k")
    if rotary_seqlens is not None:
        check_int32("rotary_seqlens", rotary_seqlens, k, like="k")
        _check_batch("rotary_seqlens", rotary_seqlens, batch)
    check_flag("rotary_interleaved", rotary_interleaved)
    if q is not None:
        _check_queries(q, cu_seqlens_q, rotary_cos, rotary_sin, batch, k)
    check_flag("q_advance", q_advance)
    descales = {"k_descale": k_descale, "v_descale": v_descale}
    check_factors(k_cache, batch, descales, rotation_seed)
    if k_scales is not None:
        check_scales("k_scales", k_scales, k_cache, k_descale)
    if v_scales is not None:
        check_scales("v_scales", v_scales, v_cache, v_descale)


def _check_queries(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    batch: int,
    k: Tensor,
) -> None:
    """Queries that are rotated beside k."""
    check_alone("q", q, DENSE if cu_seqlens_q is None else PACKED)
    check_like("q", q, k, "k")
    _check_rows("q", q, math.prod(q.shape[:-2]))
    _check_head_dim("q", q)
    if rotary_cos is None or rotary_sin is None:
        raise ValueError("q is given, must be None without rotary_cos and rotary_sin")
    check_tables(rotary_cos, rotary_sin, q, "q")
    if cu_seqlens_q is not None:
        _check_starts("cu_seqlens_q", cu_seqlens_q, batch, q, "q")
    elif q.shape[0] != batch:
        raise ValueError(f"q has batch {q.shape[0]}, must be {batch} like cache_seqlens")


def _check_rows(name: str, x: Tensor, rows: int) -> None:
    """No more than kernels count, which add those of a CTA."""
    if x.device.type == "cuda" and isinstance(rows, int) and rows >= ROWS_LIMIT:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, must have fewer rows than 2^31 - 2^10"
        )


def _refuse_other_eight_bits(name: str, tensor: Tensor) -> None:
    dtype = getattr(tensor, "dtype", None)
    if dtype in _OTHER_EIGHT_BITS:
        raise NotImplementedError(
            f"{name} of {dtype} is not there: caches of 8 bits are float8_e4m3fn or int8"
        )


def _check_attending(q: Tensor, k_cache: Tensor) -> None:
    """Queries of e4m3 go with caches of 8 bits only."""
    check_tensor("q", q)
    check_tensor("k_cache", k_cache)
    allowed = (torch.float16, torch.bfloat16, E4M3)
    if not holds_eight_bits(k_cache):
        check_alone("q", q, PACKED)
    elif q.dtype not in allowed:
        raise TypeError(
            f"q has dtype {q.dtype}, must be float16, bfloat16 or float8_e4m3fn for a cache of "
            f"{k_cache.dtype}"
        )
    else:
        check_layout("q", q, PACKED)


def _check_head_dim(name: str, x: Tensor, most: int = MAX_HEAD_DIM) -> None:
    head_dim = x.shape[-1]
    if head_dim % HEAD_DIM_MULTIPLE != 0 or not 0 < head_dim <= most:
        raise ValueError(
            f"{name} has head_dim {head_dim}, must be a multiple of {HEAD_DIM_MULTIPLE} from "
            f"{HEAD_DIM_MULTIPLE} to {most}"
        )


def _check_caches(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None,
    q: Tensor,
    like: str,
    most_v: int,
) -> None:
    """`most_v`: of v_cache's head_dim."""
    layout = ENTRIES if page_table is None else PAGES
    check_tensor("k_cache", k_cache)
    for name, cache, most in (("k_cache", k_cache, MAX_HEAD_DIM), ("v_cache", v_cache, most_v)):
        if not holds_eight_bits(k_cache):
            check_like(name, cache, q, like)
            check_alone(name, cache, layout)
        else:
            check_device(name, cache, q, like)
            check_like(name, cache, k_cache, "k_cache")
            check_layout(name, cache, layout)
            check_cache(name, cache)
        _check_head_dim(name, cache, most)
    if v_cache.shape[:-1] != k_cache.shape[:-1]:
        raise ValueError(
            f"v_cache has shape {tuple(v_cache.shape)}, must be {tuple(k_cache.shape)} like "
            "k_cache but for head_dim"
        )
    if page_table is not None and k_cache.shape[1] == 0:
        raise ValueError("k_cache has page_size 0, must be at least 1")


def _check_places(
    k_cache: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    batch: int,
    q: Tensor,
    like: str,
) -> None:
    """Where sequences are in the caches."""
    of_entries = (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad))
    for name, values in of_entries:
        if values is None:
            continue
        check_int32(name, values, q, like=like)
        _check_batch(name, values, batch)
    if page_table is not None and cache_batch_idx is not None:
        raise NotImplementedError(
            "cache_batch_idx is not there with page_table: pass the rows of page_table that it "
            "names"
        )
    if page_table is not None:
        check_int32("page_table", page_table, q, dims=2, like=like)
        if page_table.shape[0] != batch:
            raise ValueError(
                f"page_table has shape {tuple(page_table.shape)}, must be (batch, max_pages) with "
                f"batch {batch}"
            )
    elif cache_batch_idx is None and k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache has batch_cache {k_cache.shape[0]}, must be the batch {batch} without "
            "cache_batch_idx"
        )


def _check_batch(name: str, values: Tensor, batch: int) -> None:
    if values.shape[0] != batch:
        raise ValueError(f"{name} has shape ({values.shape[0]},), must be (batch,) = ({batch},)")


def _check_starts(name: str, starts: Tensor, batch: int, x: Tensor, like: str) -> None:
    check_int32(name, starts, x, like=like)
    if starts.shape[0] != batch + 1:
        raise ValueError(
            f"{name} has shape ({starts.shape[0]},), must be (batch + 1,) = ({batch + 1},)"
        )
