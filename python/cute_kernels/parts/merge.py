"""Attention to two parts of the keys, made one."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.parts import operators
from cute_kernels.registration import mark_written


def merge_part_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Makes `out` and `lse` those of attention to both parts of the keys.

    Where an LSE is -inf, there were no keys: the row's output is not looked at and may be NaN. If
    it is the part's, the row is left alone. So what adds up parts begins with an LSE of -inf alone.

    Args:
        out: (batch, seqlen, heads, head_dim) or (total, heads, head_dim), float32, float16 or
            bfloat16 (on the CPU also float64), the last dimension contiguous and a multiple of 8.
        lse: (batch, heads, seqlen) or (heads, total), float32 (float64 where out is), any strides.
        part_out, part_lse: of out's and lse's shape; part_out of any of out's dtypes.
    """
    operators.merge_(out, lse, part_out, part_lse)
    mark_written(out, lse)


def merge_parts(
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in new tensors, dense, the output in `out_dtype`, out's if None. Rows without keys
    get 0 and -inf."""
    merged: tuple[Tensor, Tensor] = operators.merge(out, lse, part_out, part_lse, out_dtype)
    return merged
