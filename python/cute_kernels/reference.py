"""Blocked attention with online softmax in PyTorch operations: the CPU path.

The algorithm, masks and results are those of the GPU kernels (forward: FlashAttention-3, arXiv
2407.08608, section 2.3 and algorithm 1; backward: FlashAttention-2, arXiv 2307.08691, algorithm 2).
Products and sums are in fp32, for fp64 inputs in fp64. Nothing of the size of all scores is ever
stored: a block of queries walks over the blocks of keys that it sees. What a row does not see has
no part in its result, even if it is not finite. Packed sequences are answered one by one.

Inside, tensors are (batch, key heads, rows, head_dim), where the rows of a query block are its
queries once for each query head of the key head; so GQA needs no copies of K and V.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of q, k, v and the sinks

QUERY_BLOCK = 128
KEY_BLOCK = 256


class Mask(NamedTuple):
    """Which keys a query sees: query i stands at key position i + diagonal, and sees the keys from
    `left` before it to `right` after it.

    None is no limit, and for the diagonal seqlen_k - seqlen_q: bottom-right aligned.
    """

    left: int | None = None
    right: int | None = None
    diagonal: int | None = None
    hidden: Tensor | None = None  # (seqlen_q, seqlen_k): which keys a query does not see besides


def mask_of(
    causal: bool,
    window_left: int | None = None,
    window_right: int | None = None,
    diagonal: int | None = None,
) -> Mask:
    """The mask of the operators' arguments: causal queries see no key after their position."""
    return Mask(window_left, 0 if causal else window_right, diagonal)


class _Blocks:
    """The geometry of one problem: which queries meet which keys, and how heads become rows."""

    def __init__(
        self, q: Tensor, k: Tensor, softmax_scale: float, mask: Mask, softcap: float = 0.0
    ):
        self.seqlen_q, self.heads = q.shape[1], q.shape[2]
        self.seqlen_k, self.key_heads = k.shape[1], k.shape[2]
        self.group = self.heads // self.key_heads
        self.left = math.inf if mask.left is None else mask.left
        self.right = math.inf if mask.right is None else mask.right
        self.hidden = mask.hidden
        self.diagonal = self.seqlen_k - self.seqlen_q if mask.diagonal is None else mask.diagonal
        self.dtype, self.device = accumulator_dtype(q.dtype), q.device
        self.softmax_scale = self._positive(softmax_scale)
        # What `scores` are in units of, and with a softcap what products are, inside of tanh.
        self.unit = self._positive(softcap) if softcap else self.softmax_scale
        self.tanh_factor = self._positive(softmax_scale / softcap) if softcap else None

    def _positive(self, number: float) -> float:
        """As a number of the dtype it is neither 0 nor infinite."""
        limits = torch.finfo(self.dtype)
        return min(max(number, limits.tiny * limits.eps), limits.max)

    def queries(self) -> Iterator[slice]:
        for start in range(0, self.seqlen_q, QUERY_BLOCK):
            yield slice(start, min(start + QUERY_BLOCK, self.seqlen_q))

    def keys(self, queries: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """The key blocks that some query sees, and where a row does not see a key of a block."""
        first, last = queries.start + self.diagonal, queries.stop - 1 + self.diagonal
        begin = int(max(0, first - self.left))
        end = int(min(self.seqlen_k, last + self.right + 1))
        for start in range(begin, end, KEY_BLOCK):
            stop = min(start + KEY_BLOCK, end)
            hidden = None
            if start < last - self.left or stop - 1 > first + self.right:
                key = torch.arange(start, stop, device=self.device)
                after = key - torch.arange(first, last + 1, device=self.device)[:, None]
                hidden = ((after > self.right) | (after < -self.left)).repeat(self.group, 1)
            if self.hidden is not None:
                also = self.hidden[queries, start:stop].repeat(self.group, 1)
                hidden = also if hidden is None else hidden | also
            yield slice(start, stop), hidden

    def rows(self, x: Tensor, queries: slice) -> Tensor:
        """A block of a (batch, seqlen, heads, d) tensor as (batch, key heads, rows, d)."""
        block = x[:, queries].to(self.dtype)
        batch, count, _, size = block.shape
        grouped = block.reshape(batch, count, self.key_heads, self.group, size)
        return grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`: (batch, key heads, rows, d) as (batch, seqlen, heads, d)."""
        batch, _, _, size = rows.shape
        grouped = rows.view(batch, self.key_heads, self.group, -1, size)
        return grouped.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def row_values(self, x: Tensor, queries: slice) -> Tensor:
        """A block of a (batch, heads, seqlen) tensor as (batch, key heads, rows, 1)."""
        block = x[:, :, queries].to(self.dtype)
        return block.reshape(block.shape[0], self.key_heads, -1, 1)

    def head_values(self, x: Tensor, queries: slice) -> Tensor:
        """A (heads) tensor as (1, key heads, rows, 1)."""
        of_rows = x.to(self.dtype)[:, None].expand(-1, queries.stop - queries.start)
        return of_rows.reshape(1, self.key_heads, -1, 1)

    def all_keys(self, x: Tensor) -> Tensor:
        """(batch, seqlen, key heads, d) as (batch, key heads, seqlen, d)."""
        return x.to(self.dtype).transpose(1, 2)

    def scores(self, q_rows: Tensor, k_block: Tensor, hidden: Tensor | None) -> Tensor:
        """Scores of a block in units of `unit`, -inf where a query does not see a key."""
        scores = q_rows @ k_block.mT
        if self.tanh_factor is not None:
            scores.mul_(self.tanh_factor).tanh_()
        return hide(scores, hidden)


def hide(scores: Tensor, hidden: Tensor | None) -> Tensor:
    """-inf in place where a row does not see a key."""
    return scores if hidden is None else scores.masked_fill_(hidden, -math.inf)


def _product(weights: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """weights @ values. Where hidden, the weight is 0, and the value adds nothing even if NaN."""
    if hidden is None or values.isfinite().all():
        return weights @ values
    wild = ~values.isfinite()
    seen = (~hidden).to(values.dtype) @ wild.to(values.dtype) > 0
    return (weights @ values.masked_fill(wild, 0.0)).masked_fill_(seen, math.nan)


def without_autocast(x: Tensor) -> torch.autocast:
    """On x's device products are of the dtypes of what is multiplied; meta tensors have no autocast
    of their own."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products, sums and of the LSE."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_outputs(q: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The output, of q's dtype unless another is given, and the LSE as every implementation
    allocates them, dense: (..., seqlen, heads, v's head_dim) and (..., heads, seqlen)."""
    *batch, seqlen, heads, _ = q.shape
    out = q.new_empty((*batch, seqlen, heads, v.shape[-1]), dtype=dtype)
    lse = q.new_empty((*batch, heads, seqlen), dtype=accumulator_dtype(q.dtype))
    return out, lse


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(softmax_scale q k^T) v and the natural logarithm of the softmax's denominator, which
    with `sinks` has exp(sink) in it. A softcap above 0 makes scores softcap tanh(score / softcap).

    Rows that see no key get 0 and -inf, or their sink. Shapes as in `flash_attn_func`.
    """
    out, lse = empty_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    if k.numel() == 0:
        lse.fill_(-math.inf)
        return out.zero_(), lse if sinks is None else lse.copy_(sinks[:, None])
    blocks = _Blocks(q, k, softmax_scale, mask, softcap)
    all_k, all_v = blocks.all_keys(k), blocks.all_keys(v)
    for queries in blocks.queries():
        q_rows = blocks.rows(q, queries)
        accumulator = q_rows.new_zeros((*q_rows.shape[:3], v.shape[3]))
        maximum = q_rows.new_full((*q_rows.shape[:3], 1), -math.inf)
        total = torch.zeros_like(maximum)
        for keys, hidden in blocks.keys(queries):
            scores = blocks.scores(q_rows, all_k[:, :, keys], hidden)
            new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            # -inf - -inf would be NaN: a row that has seen no key yet measures from 0.
            origin = new_maximum.masked_fill(new_maximum == -math.inf, 0.0)
            # Scaled are differences: scores may be beyond a float when they are scaled.
            rescale = (maximum - origin).mul_(blocks.unit).exp_()
            probabilities = scores.sub_(origin).mul_(blocks.unit).exp_()
            total = total * rescale + probabilities.sum(-1, keepdim=True)
            part = _product(probabilities, all_v[:, :, keys], hidden)
            accumulator = accumulator * rescale + part
            maximum = new_maximum
        accumulator /= total.masked_fill(total == 0, 1.0)
        row_lse = maximum * blocks.unit + total.log()
        if sinks is not None:
            of_sinks = blocks.head_values(sinks, queries)
            # Infinite minus infinite would be NaN: a row that has seen no key is 0 already, and
            # scaled scores may be beyond a float.
            limits = torch.finfo(row_lse.dtype)
            of_keys = row_lse.clamp(limits.min, limits.max)
            accumulator *= (of_keys - torch.logaddexp(of_keys, of_sinks)).exp_()
            row_lse = torch.logaddexp(row_lse, of_sinks)
        out[:, queries] = blocks.from_rows(accumulator)
        lse[:, :, queries] = row_lse.view(q.shape[0], blocks.heads, -1)
    return out, lse


def empty_sinks_gradient(q: Tensor, sinks: Tensor | None) -> Tensor:
    """As every implementation allocates it: (batch, heads), what each batch entry adds, of packed
    sequences (1, heads); without sinks no heads."""
    batch = q.shape[0] if q.dim() == 4 else 1
    heads = 0 if sinks is None else q.shape[-2]
    return q.new_empty((batch, heads), dtype=accumulator_dtype(q.dtype))


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """The gradients of q, k, v and the sinks, from those of the output and the LSE; the first three
    in `dtype`, that of the inputs if None."""
    how: Any = {"memory_format": torch.contiguous_format, "dtype": dtype or q.dtype}
    grad_q = torch.zeros_like(q, **how)
    grad_sinks = empty_sinks_gradient(q, sinks).zero_()
    if q.numel() == 0 or (k.numel() == 0 and sinks is None):
        grad_k, grad_v = (torch.zeros_like(x, **how) for x in (k, v))
        return grad_q, grad_k, grad_v, grad_sinks
    blocks = _Blocks(q, k, softmax_scale, mask, softcap)
    all_k, all_v = blocks.all_keys(k), blocks.all_keys(v)
    grad_k, grad_v = torch.zeros_like(all_k), torch.zeros_like(all_v)
    for queries in blocks.queries():
        q_rows, grad_rows = blocks.rows(q, queries), blocks.rows(grad_out, queries)
        delta = (grad_rows * blocks.rows(out, queries)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= blocks.row_values(grad_lse, queries)  # dLSE / dS = P
        lse_rows = blocks.row_values(lse, queries)
        unseen = lse_rows == -math.inf
        if sinks is not None:
            # Of an LSE of -inf the sink is all there is.
            share = (blocks.head_values(sinks, queries) - lse_rows).exp_().masked_fill_(unseen, 1.0)
            grad_sinks -= (share * delta).view(q.shape[0], blocks.heads, -1).sum(-1)
        # P = exp(S - LSE) must be 0, not NaN, in rows that see no key.
        lse_rows = lse_rows.masked_fill(unseen, math.inf)
        grad_q_rows = torch.zeros_like(q_rows)
        for keys, hidden in blocks.keys(queries):
            k_block, v_block = all_k[:, :, keys], all_v[:, :, keys]
            scores = blocks.scores(q_rows, k_block, hidden)
            slope = None if blocks.tanh_factor is None else 1 - scores.square()  # of tanh
            scores.mul_(blocks.unit)
            # No P is above 1, though the difference of large numbers may be above 0.
            probabilities = scores.sub_(lse_rows).clamp_(max=0.0).exp_()
            grad_scores = (grad_rows @ v_block.mT).sub_(delta).mul_(probabilities)
            if slope is not None:
                grad_scores.mul_(slope)
            unseen_by_keys = None
            if hidden is not None:
                probabilities.masked_fill_(hidden, 0.0)
                grad_scores.masked_fill_(hidden, 0.0)
                unseen_by_keys = hidden.mT
            grad_v[:, :, keys] += _product(probabilities.mT, grad_rows, unseen_by_keys)
            grad_k[:, :, keys] += _product(grad_scores.mT, q_rows, unseen_by_keys)
            grad_q_rows += _product(grad_scores, k_block, hidden)
        grad_q[:, queries] = blocks.from_rows(grad_q_rows.mul_(blocks.softmax_scale))
    grad_k *= blocks.softmax_scale
    return (
        grad_q,
        grad_k.transpose(1, 2).to(grad_q.dtype).contiguous(),
        grad_v.transpose(1, 2).to(grad_q.dtype).contiguous(),
        grad_sinks,
    )


class Sequence(NamedTuple):
    """One of several that are packed: the rows that it uses, and the position of its queries."""

    queries: slice
    keys: slice
    diagonal: int | None


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: list[Sequence],
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` of each sequence; rows of none get 0 and -inf. Shapes as in
    `flash_attn_varlen_func`."""
    out, lse = empty_outputs(q, v)
    out.zero_()
    lse.fill_(-math.inf)
    for queries, keys, diagonal in sequences:
        one = (q[None, queries], k[None, keys], v[None, keys])
        own_mask = mask._replace(diagonal=diagonal)
        part, part_lse = attention_forward(*one, softmax_scale, own_mask, sinks, softcap)
        out[queries], lse[:, queries] = part[0], part_lse[0]
    return out, lse


def packed_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: list[Sequence],
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """`attention_backward` of each sequence; rows of none get 0."""
    how: Any = {"memory_format": torch.contiguous_format, "dtype": dtype or q.dtype}
    grad_q, grad_k, grad_v = (torch.zeros_like(x, **how) for x in (q, k, v))
    grad_sinks = empty_sinks_gradient(q, sinks).zero_()
    for queries, keys, diagonal in sequences:
        part = attention_backward(
            grad_out[None, queries],
            None if grad_lse is None else grad_lse[None, :, queries],
            q[None, queries],
            k[None, keys],
            v[None, keys],
            out[None, queries],
            lse[None, :, queries],
            softmax_scale,
            mask._replace(diagonal=diagonal),
            sinks,
            softcap,
            dtype,
        )
        grad_q[queries], grad_k[keys], grad_v[keys] = (grad[0] for grad in part[:3])
        grad_sinks += part[3]
    return grad_q, grad_k, grad_v, grad_sinks
