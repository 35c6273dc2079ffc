"""All-gather attention: all keys that a rank's queries see come to it, some key heads at a time.

The keys lie in the order of the sequence, so that each chunk of queries is one call and nothing is
merged. While the kernels work on some heads the keys of the next are under way, and in the backward
pass the gradients of the last.
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
from cute_kernels.distributed.exchange import Message, Pending, Ranks, exchange
from cute_kernels.distributed.plan import Interval, Problem
from cute_kernels.distributed.ring import as_call, empty_rows, rows_first
from cute_kernels.reference import accumulator_dtype, empty_outputs


class Gathered(NamedTuple):
    """Keys and values of some heads, of `plan.needed_tokens`."""

    pending: Pending
    k: Tensor
    v: Tensor


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
        self.others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        self.own_routes = plan.routes(problem, ranks.rank, ranks.rank)

    def start(self, number: int) -> Gathered | None:
        """None if there is no such group."""
        if number >= len(self.groups):
            return None
        own = [rows_first(heads_of(x, self.groups[number])) for x in self._kv]
        all_rows = [empty_rows(as_call(x), self._rows) for x in own]
        sends, receives = self.messages(own, all_rows)
        pending = exchange(self.ranks, sends, receives)
        for x, gathered in zip(own, all_rows, strict=True):
            for rows, place in self.own_routes:
                gathered[slice(*place)] = x[slice(*rows)]
        return Gathered(pending, *map(as_call, all_rows))

    def messages(
        self, own: list[Tensor], all_rows: list[Tensor]
    ) -> tuple[list[Message], list[Message]]:
        """What takes rows of this rank to those who need them, and what brings others' rows: the
        way of keys. Gradients go the other way, from and to as many rows for each reader."""
        to_others = [
            (other, x[slice(*rows)])
            for other in self.others
            for rows, _ in plan.routes(self.problem, self.ranks.rank, other)
            for x in own
        ]
        from_others = [
            (other, x[slice(*place)])
            for other in self.others
            for _, place in plan.routes(self.problem, other, self.ranks.rank)
            for x in all_rows
        ]
        return to_others, from_others


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
        assert gathered is not None
        gathered.pending.wait()
        here, gathered = gathered, gathering.start(number + 1)
        margin = gathered.pending.margin if gathered else 0
        heads = heads_of_queries(q, k, key_heads)
        of_heads = heads_of(q, heads)
        own_sinks = None if sinks is None else sinks[slice(*heads)]
        whole = Whole(of_heads, v, most_parts(parts), heads_of(out, heads))
        for part in parts:
            whole.add(part, *attend(part, of_heads, here.k, here.v, options, own_sinks, margin))
        heads_of(lse, heads).copy_(whole.result()[1])
    return out, lse


class Returning(NamedTuple):
    """Gradients of some heads' keys and values: those of this rank's that the others' queries
    gave, and what is kept until the others have theirs."""

    pending: Pending
    arrived: list[tuple[Interval, Tensor, Tensor]]
    totals: list[Tensor]


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
        assert gathered is not None
        gathered.pending.wait()
        here, gathered = gathered, gathering.start(number + 1)
        margin = max(
            gathered.pending.margin if gathered else 0,
            returning.pending.margin if returning else 0,
        )
        heads = heads_of_queries(saved.q, k, key_heads)
        sums = [empty_rows(x, x.shape[-3], wide) for x in (here.k, here.v)]
        totals = [Gradient(as_call(x)) for x in sums]
        for part in parts:
            add_gradients(
                part,
                saved.heads(*heads),
                (here.k, here.v),
                heads_of(grad_q, heads),
                totals,
                options,
                margin,
            )
        for total in totals:
            total.result()
        if returning is not None:
            _finish(returning, grad_k, grad_v, gathering.groups[number - 1])
        returning = _start_return(gathering, k, v, key_heads, sums)
    if returning is not None:
        _finish(returning, grad_k, grad_v, gathering.groups[-1])
    return grad_q.to(saved.q.dtype), grad_k, grad_v


def _start_return(
    gathering: Gathering, k: Tensor, v: Tensor, key_heads: Interval, sums: list[Tensor]
) -> Returning:
    problem, ranks = gathering.problem, gathering.ranks
    own = [heads_of(x, key_heads) for x in (k, v)]
    arrived: list[tuple[Interval, Tensor, Tensor]] = []
    receives: list[Message] = []
    for other in gathering.others:
        for rows, _ in plan.routes(problem, ranks.rank, other):
            both = [empty_rows(x, rows[1] - rows[0], sums[0].dtype) for x in own]
            receives += [(other, x) for x in both]
            arrived.append((rows, as_call(both[0]), as_call(both[1])))
    _, sends = gathering.messages([], sums)
    pending = exchange(ranks, sends, receives)
    totals = [torch.zeros(x.shape, dtype=sums[0].dtype, device=x.device) for x in own]
    for total, summed in zip(totals, sums, strict=True):
        for rows, place in gathering.own_routes:
            rows_of(total, rows).add_(rows_of(as_call(summed), place))
    return Returning(pending, arrived, totals)


def _finish(returning: Returning, grad_k: Tensor, grad_v: Tensor, key_heads: Interval) -> None:
    """Adds what arrives, rank by rank, so that the sums are the same in every run."""
    returning.pending.wait()
    for rows, *both in returning.arrived:
        for total, more in zip(returning.totals, both, strict=True):
            rows_of(total, rows).add_(more)
    for grad, total in zip((grad_k, grad_v), returning.totals, strict=True):
        heads_of(grad, key_heads).copy_(total)


def heads_of_queries(q: Tensor, k: Tensor, key_heads: Interval) -> Interval:
    group = q.shape[-2] // k.shape[-2]
    return key_heads[0] * group, key_heads[1] * group
