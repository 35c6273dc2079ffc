"""All-gather attention: all keys that a rank's queries see come to it, some key heads at a time.

The keys lie in the order of the sequence, so that each chunk of queries is one call and nothing is
merged. While the kernels work on some heads the keys of the next are under way, and in the backward
pass the gradients of the last.
"""

from __future__ import annotations

from typing import Any

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
from cute_kernels.distributed.ring import margin_of
from cute_kernels.reference import accumulator_dtype, empty_outputs


class Gathering:
    """The exchange of keys and values, by groups of heads."""

    def __init__(self, problem: Problem, ranks: Ranks, q: Tensor, k: Tensor, v: Tensor):
        self.problem, self.ranks = problem, ranks
        self._kv = k, v
        self._rows = plan.count(plan.needed_tokens(problem, ranks.rank))
        key_heads = k.shape[-2]
        # Of one call: half of the queries, of all heads of a key head.
        rows = q.shape[:-3].numel() * q.shape[-3] * (q.shape[-2] // max(1, key_heads)) // 2
        self.groups = plan.head_groups(rows, key_heads)
        self._widest = max(self.groups, key=lambda heads: heads[1] - heads[0])
        self.own_routes = plan.routes(problem, ranks.rank, ranks.rank)

    def start(self, number: int) -> Any:
        """An Arrival of all rows of some heads, or None if there is no such group."""
        if number >= len(self.groups):
            return None
        like = self.of_group(number)
        k, v = map(rows_first, like)
        deliveries = [
            Delivery(other, (k[slice(*rows)], v[slice(*rows)]), place)
            for other in self.ranks.others
            for rows, (place, _) in plan.routes(self.problem, self.ranks.rank, other)
        ]
        expected = [
            (other, place)
            for other in self.ranks.others
            for _, place in plan.routes(self.problem, other, self.ranks.rank)
        ]
        arrival = self._exchange("keys", deliveries, expected, like, self._rows, k.dtype)
        for own, gathered in zip(like, (arrival.k, arrival.v), strict=True):
            for rows, place in self.own_routes:
                rows_of(gathered, place).copy_(rows_of(own, rows))
        return arrival

    def send_back(self, number: int, grads: list[Tensor]) -> Any:
        """The gradients of all rows of some heads, to where these are from; an Arrival of this
        rank's, see `plan.returns`."""
        deliveries = [
            Delivery(owner, (grads[0][slice(*one.read)], grads[1][slice(*one.read)]), one.place[0])
            for owner in self.ranks.others
            for one in plan.returns(self.problem, owner)
            if one.reader == self.ranks.rank
        ]
        returns = plan.returns(self.problem, self.ranks.rank)
        expected = [(one.reader, one.place) for one in returns]
        rows = plan.count(one.place for one in returns)
        like = self.of_group(number)
        return self._exchange("gradients", deliveries, expected, like, rows, grads[0].dtype)

    def of_group(self, number: int) -> tuple[Tensor, Tensor]:
        k, v = (heads_of(x, self.groups[number]) for x in self._kv)
        return k, v

    def _exchange(
        self,
        kind: str,
        deliveries: list[Delivery],
        expected: list[tuple[int, Interval]],
        like: tuple[Tensor, Tensor],
        rows: int,
        dtype: torch.dtype,
    ) -> Any:
        widest = [heads_of(x, self._widest) for x in self._kv]
        most = bytes_of(widest, self.problem.tokens, dtype)
        return exchange(self.ranks, Post(kind, deliveries, expected, like, rows, most, dtype))


def gather_forward(
    problem: Problem,
    ranks: Ranks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of this rank's queries on the keys of all ranks."""
    gathering = Gathering(problem, ranks, q, k, v)
    parts = plan.whole_parts(problem, ranks.rank)
    out, lse = empty_outputs(q, v)
    gathered = gathering.start(0)
    for number, key_heads in enumerate(gathering.groups):
        gathered.wait()
        here, gathered = gathered, gathering.start(number + 1)
        margin = margin_of(gathered)
        heads = heads_of_queries(q, k, key_heads)
        of_heads = heads_of(q, heads)
        own_sinks = None if sinks is None else sinks[slice(*heads)]
        whole = Whole(of_heads, v, most_parts(parts), heads_of(out, heads))
        for part in parts:
            whole.add(part, *attend(part, of_heads, here.k, here.v, options, own_sinks, margin))
        heads_of(lse, heads).copy_(whole.result()[1])
        here.release()
    return out, lse


def gather_backward(
    problem: Problem, ranks: Ranks, saved: Saved, k: Tensor, v: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of this rank's queries, keys and values."""
    wide = accumulator_dtype(k.dtype)
    gathering = Gathering(problem, ranks, saved.q, k, v)
    parts = plan.whole_parts(problem, ranks.rank)
    grad_q = torch.zeros_like(saved.q, dtype=wide, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    gathered = gathering.start(0)
    returning: Returning | None = None
    for number, key_heads in enumerate(gathering.groups):
        gathered.wait()
        here, gathered = gathered, gathering.start(number + 1)
        margin = max(margin_of(gathered), margin_of(returning.arrival if returning else None))
        heads = heads_of_queries(saved.q, k, key_heads)
        sums = [empty_rows(x, x.shape[-3], wide) for x in (here.k, here.v)]
        totals = [Gradient(as_call(x)) for x in sums]
        of_heads, to_q = saved.heads(*heads), heads_of(grad_q, heads)
        for part in parts:
            add_gradients(part, of_heads, (here.k, here.v), to_q, totals, options, margin)
        for total in totals:
            total.result()
        here.release()
        if returning is not None:
            returning.finish(grad_k, grad_v)
        returning = Returning(gathering, number, sums)
    if returning is not None:
        returning.finish(grad_k, grad_v)
    return grad_q.to(saved.q.dtype), grad_k, grad_v


class Returning:
    """Gradients of some heads' keys and values: from this rank's queries, and from the others', on
    their way."""

    def __init__(self, gathering: Gathering, number: int, sums: list[Tensor]):
        """`sums`: of all rows, from this rank's queries."""
        self._gathering, self._number = gathering, number
        self._sums = sums
        self.arrival = gathering.send_back(number, sums)

    def finish(self, grad_k: Tensor, grad_v: Tensor) -> None:
        """Adds what arrives, rank by rank, so that the sums are the same in every run."""
        gathering = self._gathering
        totals = [
            torch.zeros_like(x, dtype=self._sums[0].dtype) for x in gathering.of_group(self._number)
        ]
        for total, summed in zip(totals, self._sums, strict=True):
            for rows, place in gathering.own_routes:
                rows_of(total, rows).add_(rows_of(as_call(summed), place))
        self.arrival.wait()
        for one in plan.returns(gathering.problem, gathering.ranks.rank):
            for total, arrived in zip(totals, (self.arrival.k, self.arrival.v), strict=True):
                rows_of(total, one.rows).add_(rows_of(arrived, one.place))
        self.arrival.release()
        for grad, total in zip((grad_k, grad_v), totals, strict=True):
            heads_of(grad, gathering.groups[self._number]).copy_(total)


def heads_of_queries(q: Tensor, k: Tensor, key_heads: Interval) -> Interval:
    group = q.shape[-2] // k.shape[-2]
    return key_heads[0] * group, key_heads[1] * group
