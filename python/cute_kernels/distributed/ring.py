"""Ring attention: keys and values come from the other ranks, one rank a step.

In step s a rank has what it needs of the keys of the rank s before it, sent directly: on a switch
that is as fast as passing on what the neighbour has, nothing travels that its receiver does not
see, and no step waits for the one before. The messages of a step are under way while the step
before computes. The backward pass begins with some heads of a rank's own keys and ends with the
others: under the former the first keys arrive, under the latter the last gradients return.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_kernels.distributed import plan
from cute_kernels.distributed.calls import (
    Gradient,
    Options,
    Saved,
    Whole,
    Written,
    add_gradients,
    attend,
    heads_of,
    most_parts,
    rows_of,
)
from cute_kernels.distributed.exchange import (
    Delivery,
    Post,
    Ranks,
    as_call,
    bytes_of,
    empty_rows,
    exchange,
    rows_first,
)
from cute_kernels.distributed.plan import Interval, Problem
from cute_kernels.reference import accumulator_dtype


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

    def start(self, step: int) -> Any:
        """An Arrival, or None if there is no such step."""
        if step >= self.ranks.size:
            return None
        source, target = self.source(step), self.target(step)
        ours = plan.needed(self.problem, self.ranks.rank, source)
        theirs = plan.needed(self.problem, target, self.ranks.rank)
        k, v = self._sent
        deliveries = [
            Delivery(target, (k[slice(*rows)], v[slice(*rows)]), place)
            for rows, (place, _) in zip(theirs, plan.stored(theirs), strict=True)
        ]
        expected = [(source, place) for place in plan.stored(ours)]
        dtype = k.dtype
        most = bytes_of(self._like, k.shape[0], dtype)
        rows = plan.count(ours)
        return exchange(
            self.ranks, Post("keys", deliveries, expected, self._like, rows, most, dtype)
        )

    def send_back(self, step: int, grads: tuple[Tensor, Tensor]) -> Returned:
        """The gradients of a step's keys, to where these are from."""
        source, target = self.source(step), self.target(step)
        intervals = plan.needed(self.problem, target, self.ranks.rank)
        rows = plan.count(intervals)
        deliveries = [Delivery(source, grads, 0)] if grads[0].shape[0] > 0 else []
        expected = [(target, (0, rows))] if rows > 0 else []
        dtype = grads[0].dtype
        most = bytes_of(self._like, self._sent[0].shape[0], dtype)
        post = Post("gradients", deliveries, expected, self._like, rows, most, dtype)
        return Returned(exchange(self.ranks, post), intervals, grads)


class Returned(NamedTuple):
    """Gradients of this rank's keys and values, on their way back from another rank; and that
    rank's, on their way there."""

    arrival: Any
    intervals: tuple[Interval, ...]
    sent: tuple[Tensor, Tensor]


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
    margin = margin_of(arriving)
    # A query sees its own key: its row is in an own part, and the sinks enter there if that is one.
    own_sinks = sinks if most_parts(own) == 1 else None
    for part in own:
        whole.add(part, *attend(part, q, k, v, options, own_sinks, margin))
    for step, parts in enumerate(foreign, start=1):
        arriving.wait()
        arrived, arriving = arriving, steps.start(step + 1)
        for part in parts:
            results = attend(part, q, arrived.k, arrived.v, options, None, margin_of(arriving))
            whole.add(part, *results)
        arrived.release()
    if sinks is not None and own_sinks is None:
        whole.add_sinks(sinks)
    return whole.result()


def ring_backward(
    problem: Problem, ranks: Ranks, saved: Saved, k: Tensor, v: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of this rank's queries, keys and values."""
    wide = accumulator_dtype(k.dtype)
    steps = Steps(problem, ranks, k, v)
    grad_q = torch.zeros_like(saved.q, dtype=wide, memory_format=torch.contiguous_format)
    own_k, own_v = (torch.empty(x.shape, dtype=wide, device=x.device) for x in (k, v))
    group, key_heads = saved.q.shape[-2] // k.shape[-2], k.shape[-2]
    first_heads = plan.first_heads(key_heads)

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
    add_own(0, first_heads, margin_of(arriving))
    returned: Returned | None = None
    sums = Sums(own_k, own_v)
    for step in range(1, ranks.size):
        arriving.wait()
        arrived, arriving = arriving, steps.start(step + 1)
        margin = max(margin_of(arriving), margin_of(returned.arrival if returned else None))
        rows = arrived.k.shape[-3]
        grads = empty_rows(k, rows, wide), empty_rows(v, rows, wide)
        totals = [Gradient(as_call(x)) for x in grads]
        keys = [arrived.k, arrived.v]
        for part in plan.parts_of_received(problem, ranks.rank, steps.source(step)):
            add_gradients(part, saved, keys, grad_q, totals, options, margin)
        for total in totals:
            total.result()
        arrived.release()
        if returned is not None:
            sums.take(returned)
        returned = steps.send_back(step, grads)
    add_own(first_heads, key_heads, margin_of(returned.arrival if returned else None))
    grads_kv = sums.results(returned, k.dtype)
    return grad_q.to(saved.q.dtype), *grads_kv


def margin_of(arrival: Any) -> int:
    return 0 if arrival is None else int(arrival.margin)


class Sums:
    """The gradients of a rank's keys and values, from its own queries and from others', always in
    the same order."""

    def __init__(self, own_k: Tensor, own_v: Tensor):
        """They are not looked at before `results`."""
        self._own = own_k, own_v
        self._others: dict[tuple[Interval, ...], list[Tensor]] = {}

    def take(self, returned: Returned) -> None:
        """Adds what another rank computed to what others have."""
        returned.arrival.wait()
        arrived = [returned.arrival.k, returned.arrival.v]
        if returned.intervals in self._others:
            for total, more in zip(self._others[returned.intervals], arrived, strict=True):
                total += more
        else:
            self._others[returned.intervals] = [x.clone() for x in arrived]
        returned.arrival.release()

    def results(self, last: Returned | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Everything with what is last, rounded to a dtype."""
        for intervals, others in self._others.items():
            for own, more in zip(self._own, others, strict=True):
                for rows, place in zip(intervals, plan.stored(intervals), strict=True):
                    rows_of(own, rows).add_(rows_of(more, place))
        grad_k, grad_v = (torch.empty_like(own, dtype=dtype) for own in self._own)
        written = Written()
        if last is not None:
            last.arrival.wait()
            arrived = last.arrival.k, last.arrival.v
            for rows, place in zip(last.intervals, plan.stored(last.intervals), strict=True):
                for own, more, grad in zip(self._own, arrived, (grad_k, grad_v), strict=True):
                    sum_of = rows_of(own, rows), rows_of(more, place)
                    torch.add(*sum_of, out=rows_of(grad, rows))  # rounded in the same pass
                written.add(rows)
            last.arrival.release()
        for rows in written.missing((0, grad_k.shape[-3])):
            for own, grad in zip(self._own, (grad_k, grad_v), strict=True):
                rows_of(grad, rows).copy_(rows_of(own, rows))
        return grad_k, grad_v
