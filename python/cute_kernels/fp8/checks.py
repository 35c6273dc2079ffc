"""What a call may look like: of the public functions, then of the operators.

The CPU implementations and shape inference ask first. The CUDA implementations refuse the same on
their own, in C++ and in few words; then `checks.explain` asks here what is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_kernels.checks import (
    check_flag,
    check_int,
    check_seed,
    check_sinks,
    check_sm_margin,
    check_softmax_scale,
    check_window,
)
from cute_kernels.checks import check_tensor as check_strided
from cute_kernels.fp8.tensor import E4M3, KEY_PADDING, ROW_BLOCK, FP8Tensor
from cute_kernels.tile_checks import check_tile_config, is_own_mask

DENSE_ORDER = "batch, seqlen, heads, head_dim"
PACKED_ORDER = "total, heads, head_dim"
HEAD_DIM_MULTIPLE = 16
MAX_HEAD_DIM = 256

GPU_FLOATS = (torch.float16, torch.bfloat16)
FLOATS = (*GPU_FLOATS, torch.float32, torch.float64)
SIZE_LIMIT = 2**30  # of each size, and of the tiles of a call


def check_tensor(name: str, x: object, allows_quantised: bool = False) -> None:
    if allows_quantised and isinstance(x, FP8Tensor):
        return
    if allows_quantised and not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, must be a torch.Tensor or an FP8Tensor")
    check_strided(name, x)


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, must be on {q.device} like q")


def check_input(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Of what is to be quantised."""
    check_rank(name, x, 4, DENSE_ORDER)
    check_dtype(name, x, dtypes)
    check_head_dim(name, x.shape[3])


def check_quantisation(
    block: int | None, seed: int, dtype: torch.dtype, *, of_dtype: str = "dtype", **flags: bool
) -> None:
    """`of_dtype`: what the argument is called."""
    for name, flag in flags.items():
        check_flag(name, flag)
    if not isinstance(dtype, torch.dtype) or dtype not in (E4M3, torch.int8):
        raise TypeError(f"{of_dtype} is {dtype!r}, must be torch.float8_e4m3fn or torch.int8")
    check_int("block", block, least=1)
    check_seed(seed)


def check_quantised(q: FP8Tensor, k: FP8Tensor, v: FP8Tensor) -> None:
    """Whether attention can be computed of these."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x.data, 4, DENSE_ORDER)
        check_head_dim(name, x.shape[3])
        check_layout(name, x.data)
    if q.block is None or k.block is None:
        raise ValueError("q and k need scales of row blocks, not of channels (block=None)")
    if v.block is not None and v.scale.dim() == 3 and v.scale.shape[2] > 1:
        raise ValueError("v needs one scale for a head or for each channel (block=None)")
    if q.seed != k.seed:
        raise ValueError(f"k has seed {k.seed}, must be {q.seed} like q")
    for name, x in (("q", q), ("v", v)):
        if x.shift is not None:
            raise ValueError(f"{name} has a shift, which only k may have")
    if v.seed is not None:
        raise ValueError(f"v has seed {v.seed}, must be quantised without incoherent processing")
    check_elements(q.data, k.data, v.data)
    check_shapes(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        batch, seqlen, heads, head_dim = x.shape
        expected: tuple[int, ...] = (batch, heads, 1, head_dim)
        if x.block is not None:
            expected = (batch, heads, -(-seqlen // x.block))
        if tuple(x.scale.shape) != expected:
            raise ValueError(
                f"{name}'s scale has shape {tuple(x.scale.shape)}, must be {expected} "
                f"for block {x.block}"
            )
        check_scale(f"{name}'s scale", x.scale, q.data)


def check_head_dim(name: str, head_dim: int) -> None:
    if head_dim % HEAD_DIM_MULTIPLE != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name} has head_dim {head_dim}, must be a multiple of {HEAD_DIM_MULTIPLE} "
            f"from {HEAD_DIM_MULTIPLE} to {MAX_HEAD_DIM}"
        )


def check_rank(name: str, x: Tensor, rank: int, order: str = "") -> None:
    if x.dim() != rank:
        order = f": ({order})" if order else ""
        raise ValueError(f"{name} has shape {tuple(x.shape)}, must have {rank} dimensions{order}")


def check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} has dtype {x.dtype}, must be one of {names}")


def check_elements(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_dtype("q", q, (E4M3, torch.int8))
    if k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype}, must be {q.dtype} like q")
    if v.dtype != E4M3:
        raise TypeError(f"v has dtype {v.dtype}, must be {E4M3}")


def check_scale(name: str, scale: Tensor, q: Tensor) -> None:
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {scale.dtype}, must be torch.float32")
    check_device(name, scale, q)


def check_shapes(q: FP8Tensor | Tensor, k: FP8Tensor | Tensor, v: FP8Tensor | Tensor) -> None:
    """Whether these, of four dimensions, go together."""
    _check_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape))


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    batch, _, heads, head_dim = q
    for name, shape in (("k", k), ("v", v)):
        if shape[0] != batch:
            raise ValueError(f"{name} has batch {shape[0]}, must be {batch} like q")
    if k[3] != head_dim:
        raise ValueError(f"k has head_dim {k[3]}, must be {head_dim} like q")
    if v[1:3] != k[1:3]:
        raise ValueError(f"v has seqlen and heads {v[1:3]}, must be {k[1:3]} like k")
    if heads and (k[2] == 0 or heads % k[2]):
        raise ValueError(f"q has {heads} heads, must be a multiple of k's {k[2]}")


# Of the operators: the functions take what the operators take.


def check_rows(x: Tensor, *_: Any, name: str = "x") -> None:
    check_input(name, x, GPU_FLOATS if x.device.type == "cuda" else FLOATS)
    check_layout(name, x)


def check_values(v: Tensor, also: tuple[torch.dtype, ...] = (E4M3,)) -> None:
    inputs = GPU_FLOATS if v.device.type == "cuda" else FLOATS
    check_input("v", v, (*inputs, *also))
    check_layout("v", v)


def check_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    smooth_k: bool,
    incoherent: bool,
    seed: int,
    to_int8: bool,
    out_float16: bool,
    with_lse: bool = False,
    sinks: Tensor | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
) -> None:
    check_rows(q, name="q")
    check_rows(k, name="k")
    check_values(v, also=())
    for name, x in (("k", k), ("v", v)):
        check_device(name, x, q)
    check_shapes(q, k, v)
    check_softmax_scale(softmax_scale)
    check_variant(q, sinks, window_left, window_right)
    check_tiles(q)


def check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    causal: bool,
    out_float16: bool,
    tile_config: str | None = None,
    sinks: Tensor | None = None,
    score_offset: Tensor | None = None,
    with_lse: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    sm_margin: int = 0,
) -> None:
    check_sm_margin(sm_margin)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, 4, DENSE_ORDER)
        check_device(name, x, q)
        check_layout(name, x)
    check_elements(q, k, v)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, key_heads = k.shape[1:3]
    head_dim_v = v.shape[2]
    check_head_dim("q", head_dim)
    check_head_dim("v", head_dim_v)
    _check_shapes(tuple(q.shape), tuple(k.shape), (batch, seqlen_k, key_heads, head_dim_v))
    padded = (seqlen_k + KEY_PADDING - 1) // KEY_PADDING * KEY_PADDING
    wanted = (batch, key_heads, head_dim_v, padded)
    if tuple(v.shape) != wanted or not v.is_contiguous():
        raise ValueError(
            f"v has shape {tuple(v.shape)}, must be what quantize_fp8_values gives, {wanted}, "
            "contiguous"
        )
    for name, scale, count_heads, count in (
        ("q_scale", q_scale, heads, (seqlen_q + ROW_BLOCK - 1) // ROW_BLOCK),
        ("k_scale", k_scale, key_heads, (seqlen_k + ROW_BLOCK - 1) // ROW_BLOCK),
        ("v_scale", v_scale, key_heads, head_dim_v),
    ):
        check_rank(name, scale, 3)
        check_scale(name, scale, q)
        if tuple(scale.shape[:2]) != (batch, count_heads) or scale.shape[2] not in (1, count):
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)}, must be {(batch, count_heads, count)} "
                f"or {(batch, count_heads, 1)}"
            )
    check_softmax_scale(softmax_scale)
    check_variant(q, sinks, window_left, window_right)
    check_like_lse("score_offset", score_offset, q, (batch, heads, seqlen_q))
    right = 0 if causal else window_right
    any_call = sinks is not None or is_own_mask(q, k, window_left, right, None)
    check_tile_config(tile_config, "forward_fp8", q, v.transpose(-1, -2), any_call)
    check_tiles(q)


def check_variant(
    q: Tensor, sinks: Tensor | None, window_left: int | None, window_right: int | None
) -> None:
    check_window(window_left, window_right)
    if sinks is not None:
        check_sinks(sinks, q)


def check_like_lse(name: str, x: Tensor | None, q: Tensor, shape: tuple[int, ...]) -> None:
    if x is None:
        return
    check_scale(name, x, q)
    if tuple(x.shape) != shape or not x.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(x.shape)}, must be {shape}, contiguous")


def check_layout(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name} has strides {x.stride()}, its last dimension must be contiguous (stride 1)"
        )
    if any(isinstance(size, int) and size >= SIZE_LIMIT for size in x.shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, each size must be below 2^30")


def check_tiles(q: Tensor) -> None:
    """The grid's limit, far from what fits into memory; compilers' symbols are not asked."""
    *batches, seqlen, heads, _ = q.shape
    batch = batches[0] if batches else 1
    tiles = batch * heads * ((seqlen + ROW_BLOCK - 1) // ROW_BLOCK)
    if isinstance(tiles, int) and tiles >= SIZE_LIMIT:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, batch * heads * blocks of {ROW_BLOCK} queries must be "
            "below 2^30"
        )
