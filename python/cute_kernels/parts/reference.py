"""Merging in PyTorch operations: the CPU path."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Of (..., seqlen, heads, head_dim) and (..., heads, seqlen). Where an LSE is -inf nothing of
    the output is looked at."""
    largest = torch.maximum(lse, part_lse)
    origin = largest.masked_fill(largest == -math.inf, 0.0)
    weights = [(x - origin).exp() for x in (lse, part_lse)]
    total = weights[0] + weights[1]
    inverse = total.masked_fill(total == 0, 1.0).reciprocal()
    merged = torch.zeros(out.shape, dtype=lse.dtype)
    for x, weight in zip((out, part_out), weights, strict=True):
        of_rows = (weight * inverse).mT[..., None]
        merged += (of_rows * x.to(lse.dtype)).masked_fill_(of_rows == 0, 0.0)
    return merged.to(out_dtype or out.dtype), origin + total.log()


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """The same in `out` and `lse`, whose rows stay where the part has an LSE of -inf."""
    merged, merged_lse = merge(out, lse, part_out, part_lse)
    alone = part_lse == -math.inf
    out.copy_(torch.where(alone.mT[..., None], out, merged))
    lse.copy_(torch.where(alone, lse, merged_lse))
