"""Ring attention: keys and values come from the other ranks, one rank a step.

In step s a rank has what it needs of the keys of the rank s before it, sent directly: on a switch
that is as fast as passing on what the neighbour has, nothing travels that its receiver does not
see, and no step waits for the one before. The messages of a step are under way while the step
before computes. The backward pass begins with some heads of a rank's own keys and ends with the
others: under the former the first keys arrive, under the latter the last gradients return.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cute_kernels.distributed import plan
from cute_kernels.distributed.calls import (
    Gradient,
    Options,
    Saved,
    Whole,
    add_gradients,
    attend,
    heads_of,
    most_parts,
    rows_of,
)
from cute_kernels.distributed.exchange import Pending, Ranks, exchange
from cute_kernels.distributed.plan import Interval, Problem
from cute_kernels.reference import accumulator_dtype

# Of a rank's own work in the backward pass, the part that is done before that on others' keys.
_FIRST_SHARE = 4


class Arriving(NamedTuple):
    """Rows of a step's keys and values."""

    pending: Pending
    k: Tensor
    v: Tensor


def rows_first(x: Tensor) -> Tensor:
    """(rows, batch, heads, head_dim) or (rows, heads, head_dim), contiguous, so that some rows are
    one message."""
    return (x.transpose(0, 1) if x.dim() == 4 else x).contiguous()


def as_call(x: Tensor) -> Tensor:
    """The inverse of `rows_first`, a view."""
    return x.transpose(0, 1) if x.dim() == 4 else x


def empty_rows(like: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """As `rows_first` has them."""
    shape = (rows, *(like.shape[:1] if like.dim() == 4 else ()), *like.shape[-2:])
    return like.new_empty(shape, dtype=dtype)


class Steps:
    """The exchange of keys and values, step by step."""

    def __init__(self, problem: Problem, ranks: Ranks, k: Tensor, v: Tensor):
        self.problem, self.ranks = problem, ranks
        self._like = k, v
        self._sent = rows_first(k), rows_first(v)

    def source(self, step: int) -> int:
        """Whose keys a step has."""
        return (self.ranks.rank - step) % self.ranks.size

    def target(self, step: int) -> int:
        """Who has this rank's keys in a step."""
        return (self.ranks.rank + step) % self.ranks.size

    def start(self, step: int) -> Arriving | None:
        """None if there is no such step."""
        if step >= self.ranks.size:
            return None
        source, target = self.source(step), self.target(step)
        ours = plan.needed(self.problem, self.ranks.rank, source)
        theirs = plan.needed(self.problem, target, self.ranks.rank)
        k, v = (empty_rows(x, plan.count(ours)) for x in self._like)
        sizes = [stop - start for start, stop in ours]
        parts = [torch.split(x, sizes) for x in (k, v)]
        pending = exchange(
            self.ranks,
            [(target, x[start:stop]) for start, stop in theirs for x in self._sent],
            [(source, x) for rows in zip(*parts, strict=True) for x in rows],
        )
        return Arriving(pending, as_call(k), as_call(v))


def ring_forward(
    problem: Problem,
    ranks: Ranks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of this rank's queries on the keys of all ranks."""
    steps = Steps(problem, ranks, k, v)
    own = plan.parts(problem, ranks.rank, ranks.rank)
    foreign = [
        plan.parts_of_received(problem, ranks.rank, steps.source(step))
        for step in range(1, ranks.size)
    ]
    whole = Whole(q, v, most_parts([part for parts in (own, *foreign) for part in parts]))
    arriving = steps.start(1)
    margin = arriving.pending.margin if arriving else 0
    # A query sees its own key: its row is in an own part, and the sinks enter there if that is one.
    own_sinks = sinks if most_parts(own) == 1 else None
    for part in own:
        whole.add(part, *attend(part, q, k, v, options, own_sinks, margin))
    for step, parts in enumerate(foreign, start=1):
        assert arriving is not None
        arriving.pending.wait()
        arrived, arriving = arriving, steps.start(step + 1)
        margin = arriving.pending.margin if arriving else 0
        for part in parts:
            whole.add(part, *attend(part, q, arrived.k, arrived.v, options, None, margin))
    if sinks is not None and own_sinks is None:
        whole.add_sinks(sinks)
    return whole.result()


class Returned(NamedTuple):
    """Gradients of this rank's keys and values, on their way back from another rank, and of that
    rank's, on their way there."""

    pending: Pending
    intervals: tuple[Interval, ...]
    grad_k: Tensor
    grad_v: Tensor


def ring_backward(
    problem: Problem, ranks: Ranks, saved: Saved, k: Tensor, v: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of this rank's queries, keys and values."""
    wide = accumulator_dtype(k.dtype)
    steps = Steps(problem, ranks, k, v)
    grad_q = torch.zeros_like(saved.q, dtype=wide, memory_format=torch.contiguous_format)
    own_k, own_v = (torch.empty(x.shape, dtype=wide, device=x.device) for x in (k, v))
    group, key_heads = saved.q.shape[-2] // k.shape[-2], k.shape[-2]
    first_heads = key_heads // _FIRST_SHARE if key_heads > _FIRST_SHARE else key_heads // 2

    def add_own(start: int, stop: int, margin: int) -> None:
        if start == stop:
            return
        of_heads = saved.heads(start * group, stop * group)
        own = [heads_of(x, (start, stop)) for x in (k, v)]
        totals = [Gradient(heads_of(x, (start, stop))) for x in (own_k, own_v)]
        to_q = heads_of(grad_q, (start * group, stop * group))
        for part in plan.parts(problem, ranks.rank, ranks.rank):
            add_gradients(part, of_heads, own, to_q, totals, options, margin)
        for total in totals:
            total.result()

    arriving = steps.start(1)
    add_own(0, first_heads, arriving.pending.margin if arriving else 0)
    returned: Returned | None = None
    sums = Sums(own_k, own_v)
    for step in range(1, ranks.size):
        assert arriving is not None
        arriving.pending.wait()
        arrived, arriving = arriving, steps.start(step + 1)
        margin = max(
            arriving.pending.margin if arriving else 0, returned.pending.margin if returned else 0
        )
        rows = arrived.k.shape[-3]
        sent = [empty_rows(x, rows, wide) for x in (k, v)]
        totals = [Gradient(as_call(x)) for x in sent]
        keys = [arrived.k, arrived.v]
        for part in plan.parts_of_received(problem, ranks.rank, steps.source(step)):
            add_gradients(part, saved, keys, grad_q, totals, options, margin)
        for total in totals:
            total.result()
        if returned is not None:
            sums.take(returned)
        returned = _send_back(steps, step, sent, k, v)
    add_own(first_heads, key_heads, returned.pending.margin if returned else 0)
    if returned is not None:
        sums.take(returned)
    return grad_q.to(saved.q.dtype), *sums.results(k.dtype)


def _send_back(steps: Steps, step: int, sent: list[Tensor], k: Tensor, v: Tensor) -> Returned:
    source, target = steps.source(step), steps.target(step)
    intervals = plan.needed(steps.problem, target, steps.ranks.rank)
    received = [empty_rows(x, plan.count(intervals), sent[0].dtype) for x in (k, v)]
    pending = exchange(
        steps.ranks,
        [(source, x) for x in sent],
        [(target, x) for x in received],
    )
    return Returned(pending, intervals, as_call(received[0]), as_call(received[1]))


class Sums:
    """The gradients of a rank's keys and values, from its own queries and from others'."""

    def __init__(self, own_k: Tensor, own_v: Tensor):
        """They are not looked at before `results`."""
        self._own = own_k, own_v
        self._others: dict[tuple[Interval, ...], tuple[Tensor, Tensor]] = {}

    def take(self, returned: Returned) -> None:
        """Waits for what another rank computed. The order is the same in every run."""
        returned.pending.wait()
        arrived = returned.grad_k, returned.grad_v
        if returned.intervals not in self._others:
            self._others[returned.intervals] = arrived
            return
        for total, more in zip(self._others[returned.intervals], arrived, strict=True):
            total += more

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        for intervals, arrived in self._others.items():
            for total, more in zip(self._own, arrived, strict=True):
                place = 0
                for start, stop in intervals:
                    rows_of(total, (start, stop)).add_(rows_of(more, (place, place + stop - start)))
                    place += stop - start
        grad_k, grad_v = (total.to(dtype) for total in self._own)
        return grad_k, grad_v
