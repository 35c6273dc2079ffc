"""What a call of the packed FP8 operators may look like, see checks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import check_sm_margin, check_softmax_scale
from cute_kernels.fp8.checks import (
    FLOATS,
    GPU_FLOATS,
    PACKED_ORDER,
    SIZE_LIMIT,
    check_device,
    check_dtype,
    check_elements,
    check_head_dim,
    check_layout,
    check_rank,
    check_scale,
    check_tiles,
    check_variant,
)
from cute_kernels.fp8.tensor import E4M3, ROW_BLOCK, VALUE_KEYS, blocks_of_all, packed_value_keys
from cute_kernels.tile_checks import check_tile_config
from cute_kernels.varlen_checks import check_int32, check_lengths, check_max_seqlens


def check_varlen_values(v: Tensor, cu_seqlens: Tensor, seqused: Tensor | None) -> None:
    _check_input("v", v, also=(E4M3,))
    check_int32("cu_seqlens", cu_seqlens, v, like="v")
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens has shape (0,), must be (batch + 1,)")
    _check_value_keys(v, cu_seqlens.shape[0] - 1)
    if seqused is not None:
        check_int32("seqused", seqused, v, like="v")
        if seqused.shape[0] != cu_seqlens.shape[0] - 1:
            raise ValueError(
                f"seqused has shape ({seqused.shape[0]},), must be (batch,) = "
                f"({cu_seqlens.shape[0] - 1},)"
            )


def check_varlen_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    diagonal: Tensor | None,
    softmax_scale: float,
    causal: bool,
    smooth_k: bool,
    incoherent: bool,
    seed: int,
    to_int8: bool,
    out_float16: bool,
    with_lse: bool = False,
    sinks: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    tile_config: str | None = None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_input(name, x)
        check_device(name, x, q)
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v has total and heads {tuple(v.shape[:2])}, must be {tuple(k.shape[:2])} like k"
        )
    _check_queries_and_keys(q, k)
    check_softmax_scale(softmax_scale)
    check_lengths(q, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal)
    _check_value_keys(v, cu_seqlens_k.shape[0] - 1)
    check_max_seqlens(max_seqlen_q, max_seqlen_k)
    check_variant(q, sinks, window_left, window_right)
    as_8_bits = q.new_empty((0, *q.shape[1:]), dtype=torch.int8 if to_int8 else E4M3)
    check_tile_config(tile_config, "forward_fp8", as_8_bits, v, True)
    check_tiles(q)


def check_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    diagonal: Tensor | None,
    softmax_scale: float,
    causal: bool,
    out_float16: bool,
    sinks: Tensor | None = None,
    with_lse: bool = False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    tile_config: str | None = None,
    sm_margin: int = 0,
) -> None:
    check_sm_margin(sm_margin)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, 3, PACKED_ORDER if name != "v" else "")
        check_device(name, x, q)
        check_layout(name, x)
    check_elements(q, k, v)
    check_head_dim("v", v.shape[1])
    _check_queries_and_keys(q, k)
    check_lengths(q, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal)
    batch = cu_seqlens_q.shape[0] - 1
    (total_q, heads, _), (total_k, key_heads, _) = q.shape, k.shape
    keys = packed_value_keys(total_k, batch)
    wanted = (key_heads, v.shape[1], keys)
    if tuple(v.shape) != wanted or not v.is_contiguous():
        raise ValueError(
            f"v has shape {tuple(v.shape)}, must be what quantize_fp8_varlen_values gives, "
            f"{wanted}, contiguous"
        )
    of_rows = [blocks_of_all(total, batch, ROW_BLOCK) for total in (total_q, total_k)]
    for name, scale, shape in (
        ("q_scale", q_scale, (1, heads, of_rows[0])),
        ("k_scale", k_scale, (1, key_heads, of_rows[1])),
        ("v_scale", v_scale, (batch, key_heads, v.shape[1])),
    ):
        check_rank(name, scale, 3)
        check_scale(name, scale, q)
        if tuple(scale.shape) not in (shape, (batch, shape[1], 1)):
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)}, must be {shape} or {(batch, shape[1], 1)}"
            )
    check_softmax_scale(softmax_scale)
    check_max_seqlens(max_seqlen_q, max_seqlen_k)
    check_variant(q, sinks, window_left, window_right)
    check_tile_config(tile_config, "forward_fp8", q, v.transpose(1, 2), True)
    check_tiles(q)


def _check_input(name: str, x: Tensor, also: tuple[torch.dtype, ...] = ()) -> None:
    """Of what is to be quantised."""
    check_rank(name, x, 3, PACKED_ORDER)
    check_dtype(name, x, ((GPU_FLOATS if x.device.type == "cuda" else FLOATS) + also))
    check_head_dim(name, x.shape[2])
    check_layout(name, x)


def _check_value_keys(v: Tensor, batch: int) -> None:
    """Of the transposed v, where each sequence has whole blocks to itself."""
    keys = packed_value_keys(v.shape[0], batch)
    if isinstance(keys, int) and keys >= SIZE_LIMIT:
        raise ValueError(
            f"v has total {v.shape[0]} of {batch} sequences, in whole blocks of {VALUE_KEYS} keys "
            f"{keys}, must be below 2^30"
        )


def _check_queries_and_keys(q: Tensor, k: Tensor) -> None:
    (_, heads, head_dim), (_, key_heads, key_head_dim) = q.shape, k.shape
    check_head_dim("q", head_dim)
    if key_head_dim != head_dim:
        raise ValueError(f"k has head_dim {key_head_dim}, must be {head_dim} like q")
    if heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"q has {heads} heads, must be a multiple of k's {key_heads}")
