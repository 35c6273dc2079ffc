"""Parts of the plan as calls of the kernels, and their results made one.

Tensors are (batch, rows, heads, head_dim) or packed (rows, heads, head_dim), LSEs (batch, heads,
rows) or (heads, rows).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cute_kernels.distributed.plan import Interval, Part, joined
from cute_kernels.parts import Mask, Packed, attend_part, merge_part_, part_gradients_
from cute_kernels.reference import accumulator_dtype


class Options(NamedTuple):
    """What all parts of a call have in common."""

    softmax_scale: float
    softcap: float
    deterministic: bool


def rows_of(x: Tensor, interval: Interval) -> Tensor:
    """Rows of q, k, v, the output or a gradient."""
    return x.narrow(-3, interval[0], interval[1] - interval[0])


def heads_of(x: Tensor, heads: Interval) -> Tensor:
    """Heads of any of these, also of an LSE."""
    return x.narrow(-2, heads[0], heads[1] - heads[0])


def lse_of(lse: Tensor, interval: Interval) -> Tensor:
    return lse.narrow(-1, interval[0], interval[1] - interval[0])


def attend(
    part: Part,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sinks: Tensor | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of the part's rows of q. All rows of the tensors that are given are those of
    the part's shards."""
    out, lse = attend_part(
        rows_of(q, part.queries),
        rows_of(k, part.keys),
        rows_of(v, part.keys),
        options.softmax_scale,
        *_mask(part, q),
        softcap=options.softcap,
        sinks=sinks,
        sm_margin=sm_margin,
    )
    return out, lse


class Written:
    """Which rows of a tensor have something in them."""

    def __init__(self) -> None:
        self._rows: tuple[Interval, ...] = ()

    def meets(self, rows: Interval) -> bool:
        return any(start < rows[1] and rows[0] < stop for start, stop in self._rows)

    def add(self, rows: Interval) -> None:
        self._rows = joined((*self._rows, rows))

    def missing(self, rows: Interval) -> Iterator[Interval]:
        """Of these rows those that have nothing."""
        start = rows[0]
        for written in (*self._rows, (rows[1], rows[1])):
            stop = min(written[0], rows[1])
            if start < stop:
                yield start, stop
            start = max(start, written[1])


class Whole:
    """Results of parts, made those of all keys as they come."""

    def __init__(self, q: Tensor, v: Tensor, most_parts: int, out: Tensor | None = None):
        """`most_parts`: of a row. `out`: where the output is to be, of q's dtype."""
        self._q = q
        self._shape = (*q.shape[:-1], v.shape[-1])
        self._wide = accumulator_dtype(q.dtype)
        # A second part is rounded as it is added, to what the sum would be rounded to.
        self._dtype = q.dtype if most_parts <= 2 else self._wide
        self._out = out if most_parts <= 2 else None
        self._lse: Tensor | None = None
        self._written = Written()

    def add(self, part: Part, out: Tensor, lse: Tensor) -> None:
        rows = part.queries
        if self._out is None and self._lse is None and out.shape == self._shape:
            self._out, self._lse = out.to(self._dtype), lse
            self._written.add(rows)
            return
        all_out, all_lse = self._allocated()
        if self._written.meets(rows):
            self._clear(rows)
            merge_part_(rows_of(all_out, rows), lse_of(all_lse, rows), out, lse)
        else:
            rows_of(all_out, rows).copy_(out)
            lse_of(all_lse, rows).copy_(lse)
        self._written.add(rows)

    def add_sinks(self, sinks: Tensor) -> None:
        """To rows that see a key."""
        out, lse = self._allocated()
        self._clear((0, self._shape[-3]))
        of_rows = sinks.to(self._wide)[:, None].masked_fill(lse == -torch.inf, -torch.inf)
        merge_part_(out, lse, out.new_zeros(self._shape[-1:]).expand(self._shape), of_rows)

    def result(self) -> tuple[Tensor, Tensor]:
        """In q's dtype; 0 and -inf where there is no part."""
        out, lse = self._allocated()
        self._clear((0, self._shape[-3]))
        return out.to(self._q.dtype), lse

    def _allocated(self) -> tuple[Tensor, Tensor]:
        if self._out is None:
            self._out = self._q.new_empty(self._shape, dtype=self._dtype)
        if self._lse is None:
            *batch, rows, heads, _ = self._shape
            self._lse = self._q.new_empty((*batch, heads, rows), dtype=self._wide)
        return self._out, self._lse

    def _clear(self, rows: Interval) -> None:
        out, lse = self._allocated()
        for missing in self._written.missing(rows):
            rows_of(out, missing).zero_()
            lse_of(lse, missing).fill_(-torch.inf)


def most_parts(parts: Sequence[Part]) -> int:
    """How many parts a row of the queries has at most."""
    ends = [end for part in parts for end in ((part.queries[0], 1), (part.queries[1], -1))]
    most = now = 0
    for _, change in sorted(ends):
        now += change
        most = max(most, now)
    return most


class Gradient:
    """The gradient of keys or values in the dtype of sums, while parts write or add to its rows."""

    def __init__(self, total: Tensor):
        """`total`: where it is to be, not written yet."""
        self.total = total
        self._written = Written()

    def is_added_to(self, rows: Interval) -> bool:
        """Whether a part that has these rows must add to them rather than write them; it will have
        written them all."""
        met = self._written.meets(rows)
        if met:
            self._clear(rows)
        self._written.add(rows)
        return met

    def result(self) -> Tensor:
        """All of it, 0 where no part wrote."""
        self._clear((0, self.total.shape[-3]))
        return self.total

    def _clear(self, rows: Interval) -> None:
        for missing in self._written.missing(rows):
            rows_of(self.total, missing).zero_()


class Saved(NamedTuple):
    """What gradients of parts are made from: of the queries, and of all their keys."""

    grad_out: Tensor
    grad_lse: Tensor | None
    q: Tensor
    out: Tensor
    lse: Tensor

    def heads(self, start: int, stop: int) -> Saved:
        """The same of some heads."""
        heads = start, stop
        grad_out, q, out, lse = (
            heads_of(x, heads) for x in (self.grad_out, self.q, self.out, self.lse)
        )
        grad_lse = None if self.grad_lse is None else heads_of(self.grad_lse, heads)
        return Saved(grad_out, grad_lse, q, out, lse)


def add_gradients(
    part: Part,
    saved: Saved,
    kv: Sequence[Tensor],
    grad_q: Tensor,
    grads_kv: Sequence[Gradient],
    options: Options,
    sm_margin: int = 0,
) -> None:
    """Adds the part's gradients to that of q, and to those of k and v."""
    grad_lse = saved.grad_lse
    mask, packed = _mask(part, saved.q)
    adds = [grad.is_added_to(part.keys) for grad in grads_kv]
    part_gradients_(
        rows_of(grad_q, part.queries),
        rows_of(grads_kv[0].total, part.keys),
        rows_of(grads_kv[1].total, part.keys),
        rows_of(saved.grad_out, part.queries),
        rows_of(saved.q, part.queries),
        rows_of(kv[0], part.keys),
        rows_of(kv[1], part.keys),
        rows_of(saved.out, part.queries),
        lse_of(saved.lse, part.queries),
        options.softmax_scale,
        mask,
        packed,
        grad_lse=None if grad_lse is None else lse_of(grad_lse, part.queries),
        add_to_q=True,
        add_to_kv=all(adds),
        softcap=options.softcap,
        deterministic=options.deterministic,
        sm_margin=sm_margin,
    )


def _mask(part: Part, q: Tensor) -> tuple[Mask, Packed | None]:
    if q.dim() == 3:
        return Mask(part.left, part.right), _packed(part, q.device)
    (block,) = part.blocks
    if block.is_full:
        return Mask(), None
    (diagonal,) = part.diagonals
    queries, keys = block.sizes
    # Bottom-right aligned is what the fastest kernels know.
    return Mask(part.left, part.right, None if diagonal == keys - queries else diagonal), None


@functools.lru_cache(maxsize=1024)
def _packed(part: Part, device: torch.device) -> Packed:
    """Copied once: the same parts come in every layer."""
    queries = [block.queries for block in part.blocks]
    keys = [block.keys for block in part.blocks]
    rows = [_starts(queries), _starts(keys), _sizes(queries), _sizes(keys), list(part.diagonals)]
    numbers = torch.tensor([n for of in rows for n in of], dtype=torch.int32, device="cpu")
    cu_q, cu_k, used_q, used_k, diagonal = torch.split(
        numbers.to(device, non_blocking=True), [len(n) for n in rows]
    )
    longest = max(_sizes(queries)), max(_sizes(keys))
    return Packed(cu_q, cu_k, used_q, used_k, diagonal, *longest)


def _starts(intervals: list[Interval]) -> list[int]:
    first = intervals[0][0]
    return [start - first for start, _ in intervals] + [intervals[-1][1] - first]


def _sizes(intervals: list[Interval]) -> list[int]:
    return [stop - start for start, stop in intervals]
