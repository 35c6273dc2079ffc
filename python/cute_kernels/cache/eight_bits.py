"""Caches of 8 bits: what a call with one may look like, and what its numbers mean.

Their numbers, e4m3 or int8, are keys and values once multiplied by a factor: of the key head of
their sequence, or of their row, or of their page. Keys may be rotated (fp8/rotation.py), which
queries are then, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import check_device, check_int
from cute_kernels.fp8.rotation import rotate
from cute_kernels.torch_private import surely

E4M3 = torch.float8_e4m3fn
DTYPES = (E4M3, torch.int8)
HEAD_DIM_MULTIPLE = 16
TREE_TOKENS = 64

_LARGEST = {E4M3: 448.0, torch.int8: 127.0}
_SMALLEST = 2.0**-100  # rows whose elements are all smaller become 0


def holds_eight_bits(cache: Tensor) -> bool:
    return cache.dtype in DTYPES


def output_dtype(q: Tensor) -> torch.dtype:
    """Of attention to queries, of which e4m3 ones get what FlashAttention-3 gives them."""
    return torch.bfloat16 if q.dtype == E4M3 else q.dtype


def check_cache(name: str, cache: Tensor) -> None:
    if cache.shape[-1] % HEAD_DIM_MULTIPLE != 0:
        raise ValueError(
            f"{name} has head_dim {cache.shape[-1]}, must be a multiple of {HEAD_DIM_MULTIPLE} for "
            f"{cache.dtype}"
        )


def check_factors(
    k_cache: Tensor,
    batch: int,
    given: dict[str, Tensor | None],
    rotation_seed: int | None,
    of_queries: str = "",
) -> None:
    """Descales, and whether keys are rotated. `of_queries`: the descale that has no rows."""
    for name, factor in given.items():
        if factor is None:
            continue
        if not holds_eight_bits(k_cache):
            raise ValueError(f"{name} is given, must be None for a cache of {k_cache.dtype}")
        check_device(name, factor, k_cache, "k_cache")
        if factor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {factor.dtype}, must be torch.float32")
        pages, rows, heads, _ = k_cache.shape
        allowed: list[tuple[int, ...]] = [(batch, heads)]
        what = f"(batch, key heads) = {allowed[0]}"
        if name != of_queries:
            allowed += [(pages, rows, heads), (pages, 1, heads)]
            what += f", or of pages' rows {allowed[1]} or {allowed[2]}"
        if tuple(factor.shape) not in allowed:
            raise ValueError(f"{name} has shape {tuple(factor.shape)}, must be {what}")
    check_int("rotation_seed", rotation_seed)
    head_dim = k_cache.shape[-1]
    if rotation_seed is None:
        return
    if not holds_eight_bits(k_cache):
        raise ValueError(f"incoherent is True, must be False for a cache of {k_cache.dtype}")
    if head_dim & (head_dim - 1) != 0:
        raise ValueError(f"k_cache has head_dim {head_dim}, must be a power of 2 with incoherent")


def check_scales(name: str, scales: Tensor, cache: Tensor, descale: Tensor | None) -> None:
    """Factors of rows that are written with them."""
    if not holds_eight_bits(cache):
        raise ValueError(f"{name} is given, must be None for a cache of {cache.dtype}")
    check_device(name, scales, cache, "k_cache")
    if scales.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {scales.dtype}, must be torch.float32")
    if scales.shape != cache.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(scales.shape)}, must be {tuple(cache.shape[:-1])} like the "
            "cache but for head_dim"
        )
    if descale is not None:
        raise ValueError(f"{name} is given, must be None with {name[0]}_descale")


def check_stored(tensors: dict[str, Tensor], **refused: object) -> None:
    """Of new keys and values with the caches' dtype, which are moved as they are, two numbers at a
    time: they and the caches, and what would change them."""
    dtype = tensors["k"].dtype
    for name, given in refused.items():
        if given is not None:
            raise ValueError(
                f"{name} is given, must be left out for k of {dtype}, which is stored as it is"
            )
    for name, x in tensors.items():
        strides = [stride for n, stride in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
        if any(surely(n % 2 != 0) for n in (x.storage_offset(), *strides)):
            raise ValueError(
                f"{name} has strides {x.stride()} and offset {x.storage_offset()}, must be "
                f"multiples of 2 for k of {dtype}"
            )


def check_tree(tree_mask: Tensor, q: Tensor) -> None:
    check_device("tree_mask", tree_mask, q)
    if tree_mask.dtype != torch.int64:
        raise TypeError(f"tree_mask has dtype {tree_mask.dtype}, must be torch.int64")
    if tree_mask.shape != q.shape[:1]:
        raise ValueError(
            f"tree_mask has shape {tuple(tree_mask.shape)}, must be (total_q,) = ({q.shape[0]},)"
        )
    if tree_mask.stride(0) != 1 and tree_mask.shape[0] > 1:
        raise ValueError(f"tree_mask has stride {tree_mask.stride(0)}, must be contiguous")


def factor_of(descale: Tensor | None, sequence: int, rows: tuple[Tensor, Tensor]) -> Tensor | float:
    """Of a sequence's rows, which are at `rows` of the cache, for each head: (rows or 1, key heads,
    1)."""
    if descale is None:
        return 1.0
    if descale.dim() == 2:
        return descale[sequence][None, :, None]
    pages, slots = rows
    return descale[pages, slots if descale.shape[1] > 1 else torch.zeros_like(slots)][..., None]


def quantised(
    x: Tensor, factor: Tensor | float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(rows, key heads, head_dim) as numbers of 8 bits, and what they are multiples of: `factor`,
    or without one what makes the largest of a row and head the dtype's largest. NaN of e4m3 stays
    NaN, in int8 it is 0; a row that is not finite has such a factor."""
    wide, largest = x.float(), _LARGEST[dtype]
    if factor is None:
        top = wide.abs().amax(-1, keepdim=True)
        factor = torch.where(top < _SMALLEST, 0.0, top / largest)
    factor = torch.as_tensor(factor).expand(*x.shape[:2], 1)
    scaled = torch.where(factor == 0, 0.0, wide / factor)
    if dtype == torch.int8:
        numbers = scaled.nan_to_num(0.0, torch.inf, -torch.inf).round().clamp(-128, 127)
    else:
        numbers = scaled.clamp(-largest, largest)
    return numbers.to(dtype), factor.squeeze(-1)


def rotated(x: Tensor, rotation_seed: int | None) -> Tensor:
    return x if rotation_seed is None else rotate(x, rotation_seed)
