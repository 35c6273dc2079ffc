"""What tables of rotary position embedding may look like, see cute_kernels/checks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import check_device

ROTARY_MULTIPLE = 16


def check_tables(cos: Tensor, sin: Tensor, x: Tensor, like: str) -> None:
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_device(name, table, x, like)
        if table.dtype not in (torch.float32, x.dtype):
            raise TypeError(
                f"{name} has dtype {table.dtype}, must be torch.float32 or {x.dtype} like {like}"
            )
        if table.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}, must have 2 dimensions: "
                "(positions, rotary_dim / 2)"
            )
        if table.stride(-1) != 1 and table.shape[-1] > 1:
            raise ValueError(
                f"{name} has strides {table.stride()}, its last dimension must be contiguous "
                "(stride 1)"
            )
    if sin.dtype != cos.dtype:
        raise TypeError(f"rotary_sin has dtype {sin.dtype}, must be {cos.dtype} like rotary_cos")
    if sin.shape != cos.shape:
        raise ValueError(
            f"rotary_sin has shape {tuple(sin.shape)}, must be {tuple(cos.shape)} like rotary_cos"
        )
    rotary_dim, head_dim = 2 * cos.shape[1], x.shape[-1]
    if rotary_dim % ROTARY_MULTIPLE != 0 or rotary_dim > head_dim:
        raise ValueError(
            f"rotary_cos has shape {tuple(cos.shape)}: rotary_dim is {rotary_dim}, must be a "
            f"multiple of {ROTARY_MULTIPLE} up to {like}'s head_dim {head_dim}"
        )
