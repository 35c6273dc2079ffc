"""Attention with a variant in PyTorch's own operations: the CPU path, which has their gradients.

All scores of a block of queries are there at once, and are kept for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_kernels.reference import (
    QUERY_BLOCK,
    Mask,
    Sequence,
    accumulator_dtype,
    without_autocast,
)
from cute_kernels.variants.block_mask import BlockMask
from cute_kernels.variants.kinds import FULL, HIDDEN
from cute_kernels.variants.places import ask, places, seen_by
from cute_kernels.variants.variant import BoundVariant


def variant_attention(
    variant: BoundVariant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None = None,
    block_mask: BlockMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a dense call, shapes as in `flash_attn_func`."""
    batch = torch.arange(q.shape[0], device=q.device)
    return _attention(variant, q, k, v, softmax_scale, mask, sinks, batch, 0, 0, block_mask)


def packed_variant_attention(
    variant: BoundVariant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: list[Sequence],
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of each sequence; rows of none get 0 and -inf. Shapes as in
    `flash_attn_varlen_func`."""
    out = q.new_zeros((*q.shape[:2], v.shape[-1]))
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=accumulator_dtype(q.dtype))
    for i, (queries, keys, _) in enumerate(sequences):
        batch = torch.tensor([i], device=q.device)
        one = (q[None, queries], k[None, keys], v[None, keys])
        places = (batch, queries.start, keys.start)
        part, part_lse = _attention(variant, *one, softmax_scale, mask, sinks, *places)
        rows = torch.arange(queries.start, queries.stop, device=q.device)
        out = out.index_copy(0, rows, part[0])
        lse = lse.index_copy(1, rows, part_lse[0])
    return out, lse


def _attention(
    variant: BoundVariant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None,
    batch: Tensor,
    row_q: int,
    row_k: int,
    block_mask: BlockMask | None = None,
) -> tuple[Tensor, Tensor]:
    dtype, group = accumulator_dtype(q.dtype), q.shape[2] // max(1, k.shape[2])
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    all_k, all_v = (x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    captured = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in variant.captured().items()
    }
    hides = block_mask is not None or variant.variant.python["mask"] is not None
    hides |= mask.left is not None or mask.right is not None
    outs, lses = [], []
    for start in range(0, max(1, seqlen_q), QUERY_BLOCK):
        rows = q[:, start : start + QUERY_BLOCK].to(dtype).transpose(1, 2)
        query = torch.arange(start, start + rows.shape[2], device=q.device)[:, None]
        key = torch.arange(seqlen_k, device=q.device)
        lengths = (seqlen_q, seqlen_k)
        names = places(batch, q.shape[2], query, key, lengths, row_q, row_k) | captured
        shape = (*rows.shape[:3], seqlen_k)
        seen = seen_by(mask, names["position"], key).expand(shape)
        shown = None
        if variant.variant.python["mask"] is not None:
            shown = ask(variant, "mask", names).expand(shape)
        if block_mask is not None:
            kinds = kinds_at(block_mask, query[:, 0], key)
            shown = (
                kinds != HIDDEN if shown is None else (kinds == FULL) | shown & (kinds != HIDDEN)
            )
        if shown is not None:
            seen = seen & shown
        told = seen if hides and captured else None
        scores = _products(rows, all_k, seen) * softmax_scale
        if variant.variant.python["score"] is not None:
            # What hides a key hides also what its score would be.
            known = scores if told is not None else scores.masked_fill(~seen, 0.0)
            scores = ask(variant, "score", {**names, "score": known}, told)
        scores = scores.to(dtype).expand_as(seen).masked_fill(~seen, -math.inf)
        if sinks is not None:
            of_sinks = sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, of_sinks], -1)
        p, lse = _softmax(scores)
        p = p[..., :seqlen_k].masked_fill(~seen, 0.0)  # also where the LSE is NaN
        if variant.variant.python["weight"] is not None:
            weight = ask(variant, "weight", names, told).to(dtype)
            p = (p * weight).masked_fill(~seen, 0.0)
        outs.append(_weighted_sum(p, all_v, seen))
        lses.append(lse)
    return torch.cat(outs, 2).transpose(1, 2).to(q.dtype).contiguous(), torch.cat(lses, 2)


def kinds_at(block_mask: BlockMask, query: Tensor, key: Tensor) -> Tensor:
    """Those of the blocks that pairs lie in, (batch, heads, queries, keys); batch and heads may be
    1."""
    of_queries, of_keys = block_mask.block_size
    return block_mask.kinds[:, :, query // of_queries][..., key // of_keys]


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows, and their LSE; 0 and -inf, without a gradient, of rows of nothing but -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    origin = scores.detach().amax(-1, keepdim=True)
    # Infinite minus infinite would be NaN. A sink may be infinite; scores that are show.
    origin = origin.masked_fill(origin == -math.inf, 0.0).clamp(max=torch.finfo(scores.dtype).max)
    p = (scores - origin).exp()
    total = p.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (origin + total.log()).masked_fill(empty, -math.inf)
    return p / total, lse[..., 0]


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """With 0 in rows that are not finite, and which these are: (..., rows, 1)."""
    wild = ~x.isfinite().all(-1, keepdim=True)
    return x.masked_fill(wild, 0.0), wild


def _sum_of_seen(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """weights @ values. Where not seen, the weight is 0, and the value adds nothing even if NaN."""
    wild = ~values.isfinite()
    sees_wild = seen.to(values.dtype) @ wild.to(values.dtype) > 0
    return (weights @ values.masked_fill(wild, 0.0)).masked_fill(sees_wild, math.nan)


class _Products(torch.autograd.Function):
    """Q K^T; a key that is not finite makes NaN of what sees it, in gradients too, and of nothing
    else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        (finite_q, wild_q), (finite_k, wild_k) = _finite(q), _finite(k)
        return (finite_q @ finite_k.mT).masked_fill(wild_q | wild_k.mT, math.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, seen = ctx.saved_tensors
        grad = grads[0].masked_fill(~seen, 0.0)
        with without_autocast(q):
            return _sum_of_seen(grad, k, seen), _sum_of_seen(grad.mT, q, seen.mT), None


class _WeightedSum(torch.autograd.Function):
    """P V, to which what a query does not see adds nothing, even if NaN; nor to its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        return _sum_of_seen(p, values, seen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        p, values, seen = ctx.saved_tensors
        with without_autocast(values):
            of_p = (grad @ values.mT).masked_fill(~seen, 0.0)
            return of_p, _sum_of_seen(p.mT, grad, seen.mT), None


_weighted_sum: Callable[[Tensor, Tensor, Tensor], Tensor] = _WeightedSum.apply
_products: Callable[[Tensor, Tensor, Tensor], Tensor] = _Products.apply
