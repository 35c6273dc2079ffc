"""What the forms of attention over several ranks are expected to take, and which is the fastest.

A model of a timeline for each rank: kernels one after another on one stream, messages on another,
as `ring`, `gather` and `heads` order them. What a machine does in a second is measured, or that of
`H100`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cute_kernels.arguments import Window, window_of
from cute_kernels.distributed import plan
from cute_kernels.distributed.layouts import chunks_of_all
from cute_kernels.distributed.plan import Interval, Part, Problem

_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one GPU, all in a second."""

    forward: float  # floating-point operations of the forward kernel
    backward: float
    memory: float  # bytes, read or written
    link: float  # bytes to another GPU of the same node, while as many come
    between: float  # the same between nodes
    node: int = 8  # GPUs
    latency: float = 3e-4  # seconds that messages of a step take beside their bytes
    call: float = 12e-6  # seconds of a kernel's start and end, when it does not fill the GPU
    exchange: float = 220e9  # bytes of an all-to-all inside a node
    messages: int = 8  # multiprocessors that are left to messages; copy engines need none


H100 = Machine(forward=640e12, backward=560e12, memory=2.6e12, link=150e9, between=45e9)


class Shape(NamedTuple):
    """One attention over all ranks, in 16 bits."""

    problem: Problem
    batch: int
    heads: int
    key_heads: int
    head_dim: int

    @property
    def rows(self) -> int:
        return self.batch * self.problem.tokens // self.problem.ranks

    def of_keys(self, rows: int, size: int = 2) -> float:
        """Bytes of K and V of so many rows."""
        return 2 * size * self.batch * rows * self.key_heads * self.head_dim

    def of_queries(self, rows: int, size: int = 2) -> float:
        return size * self.batch * rows * self.heads * self.head_dim


class Prediction(NamedTuple):
    """`function`: of this module's functions, "ring_attn_func" and so on; `mesh`: for it, how many
    ranks share the sequence and how many share the heads; `seconds`: of the slowest rank;
    `efficiency`: of the speed of so many single GPUs; `balance`: of the work, the mean rank's share
    of the slowest rank's."""

    function: str
    layout: str
    mesh: tuple[int, int]
    seconds: float
    efficiency: float
    balance: float


def choose(
    tokens: int,
    ranks: int,
    heads: int,
    key_heads: int,
    head_dim: int = 128,
    causal: bool = False,
    window_size: Window = (-1, -1),
    cu_seqlens: Sequence[int] | None = None,
    batch: int = 1,
    backward: bool = True,
    machine: Machine = H100,
) -> list[Prediction]:
    """The forms that can answer a call, the fastest first.

    Args:
        tokens: of the whole sequence; ranks: that share it.
        cu_seqlens: where packed sequences begin, as of `ring_attn_func`; then the batch is 1.
        backward: whether gradients are computed too.
        machine: what the GPUs do in a second, see `measure`.

    Raises:
        ValueError: no form can answer it: the tokens do not divide by the ranks.
    """
    causal, left, right = window_of(window_size, causal)
    documents = (0, tokens) if cu_seqlens is None else tuple(cu_seqlens)
    right = 0 if causal else right
    alone = Shape(
        Problem("contiguous", 1, tokens, documents, left, right), batch, heads, key_heads, head_dim
    )
    ideal = _alone(alone, machine, backward) / ranks
    found = []
    for function, layout, mesh in _candidates(tokens, ranks, heads, key_heads):
        problem = Problem(layout, mesh[0], tokens, documents, left, right)
        shape = Shape(problem, batch, heads, key_heads, head_dim)
        seconds = max(_times(function, shape, mesh[1], machine, backward))
        work = [plan.work(problem, rank) for rank in range(mesh[0])]
        balance = sum(work) / len(work) / max(1, *work)
        found.append(Prediction(function, layout, mesh, seconds, ideal / seconds, balance))
    if not found:
        raise ValueError(f"{tokens} tokens cannot be shared by {ranks} ranks: pad them")
    return sorted(found, key=lambda prediction: prediction.seconds)


def _candidates(
    tokens: int, ranks: int, heads: int, key_heads: int
) -> Iterator[tuple[str, str, tuple[int, int]]]:
    def can_cut(layout: str, parts: int) -> bool:
        return tokens % chunks_of_all(layout, parts) == 0 and tokens % ranks == 0

    for layout in ("zigzag", "contiguous", "stripe"):
        if can_cut(layout, ranks):
            yield "ring_attn_func", layout, (ranks, 1)
            if layout != "stripe":
                yield "all_gather_attn_func", layout, (ranks, 1)
    for shared in range(2, ranks + 1):
        if ranks % shared or heads % shared or key_heads % shared:
            continue
        for layout in ("contiguous",) if shared == ranks else ("zigzag", "contiguous"):
            if can_cut(layout, ranks // shared):
                yield "ulysses_attn_func", layout, (ranks // shared, shared)


class _Timeline:
    """Of one rank: kernels, and messages beside them."""

    def __init__(self, machine: Machine):
        self.now = 0.0
        self._machine = machine
        self._free = 0.0  # when messages are all done

    def send(self, number_of_bytes: float, ranks: int) -> float:
        """When messages among so many neighbours will be done, that begin after those before."""
        if number_of_bytes == 0:
            return self.now
        start = max(self.now, self._free)
        machine = self._machine
        link = machine.link if ranks <= machine.node else machine.between
        self._free = start + number_of_bytes / link + machine.latency
        return self._free

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)

    def compute(self, operations: float, rate: float) -> None:
        """A kernel, which has fewer multiprocessors if there are messages when it starts."""
        if operations == 0:
            return
        seconds = operations / rate
        if self._free > self.now:
            seconds /= 1 - self._machine.messages / _MULTIPROCESSORS
        self.now += seconds + self._machine.call

    def move(self, number_of_bytes: float) -> None:
        """A copy, a sum or a merge."""
        if number_of_bytes > 0:
            self.now += number_of_bytes / self._machine.memory


def _times(
    function: str, shape: Shape, shared: int, machine: Machine, backward: bool
) -> Iterator[float]:
    """Of each rank of the ring."""
    ring = shape.problem.ranks
    for rank in range(ring):
        timeline = _Timeline(machine)
        if function == "ulysses_attn_func":
            local = shape._replace(heads=shape.heads // shared, key_heads=shape.key_heads // shared)
            _all_to_all(timeline, shape, shared, machine, backward)
            _ring(timeline, local, rank, machine, backward, shared)
        elif function == "ring_attn_func":
            _ring(timeline, shape, rank, machine, backward)
        else:
            _gather(timeline, shape, rank, machine, backward)
        yield timeline.now


def _alone(shape: Shape, machine: Machine, backward: bool) -> float:
    timeline = _Timeline(machine)
    _ring(timeline, shape, 0, machine, backward)
    return timeline.now


def _operations(shape: Shape, parts: Sequence[Part], products: int = 2) -> float:
    seen = sum(block.seen() for part in parts for block in part.blocks)
    return float(2 * products * shape.batch * shape.heads * shape.head_dim * seen)


def _rows(parts: Sequence[Part]) -> int:
    return sum(part.queries[1] - part.queries[0] for part in parts)


def _ring(
    timeline: _Timeline,
    shape: Shape,
    rank: int,
    machine: Machine,
    backward: bool,
    shared: int = 1,
) -> None:
    """`shared`: by how many ranks its neighbours are apart."""
    problem, ranks = shape.problem, shape.problem.ranks
    own = plan.parts(problem, rank, rank)
    sources = [(rank - step) % ranks for step in range(1, ranks)]
    targets = [(rank + step) % ranks for step in range(1, ranks)]
    foreign = [plan.parts(problem, rank, source) for source in sources]

    def keys(step: int) -> float:
        """Bytes of a step, of which as many go as come: the larger."""
        return max(
            shape.of_keys(plan.count(plan.needed(problem, rank, sources[step]))),
            shape.of_keys(plan.count(plan.needed(problem, targets[step], rank))),
        )

    arrives = timeline.send(keys(0), ranks * shared) if foreign else 0.0
    timeline.compute(_operations(shape, own), machine.forward)
    # Merged in 16 bits if there are two parts, else in 32: two read, one written.
    size = 2 if ranks == 2 else 4
    for step, parts in enumerate(foreign):
        timeline.wait(arrives)
        arrives = timeline.send(keys(step + 1), ranks * shared) if step + 1 < len(foreign) else 0.0
        timeline.compute(_operations(shape, parts), machine.forward)
        timeline.move(shape.of_queries(_rows(parts), 2 + 2 * size))
    if not backward:
        return
    first = plan.first_heads(shape.key_heads) / shape.key_heads
    whole = _operations(shape, own, 5)
    arrives = timeline.send(keys(0), ranks * shared) if foreign else 0.0
    timeline.compute(first * whole, machine.backward)
    returned = 0.0
    for step, parts in enumerate(foreign):
        timeline.wait(arrives)
        arrives = timeline.send(keys(step + 1), ranks * shared) if step + 1 < len(foreign) else 0.0
        timeline.compute(_operations(shape, parts, 5), machine.backward)
        timeline.wait(returned)
        if step > 0:
            timeline.move(3 * 2 * keys(step))
        returned = timeline.send(2 * keys(step), ranks * shared)
    timeline.compute((1 - first) * whole, machine.backward)
    timeline.wait(returned)
    if foreign:
        # The last sums, and rounding.
        timeline.move(3 * 2 * keys(len(foreign) - 1))
        timeline.move(3 * shape.of_keys(shape.rows // shape.batch))
        timeline.move(shape.of_queries(shape.rows // shape.batch, 10))


def _gather(timeline: _Timeline, shape: Shape, rank: int, machine: Machine, backward: bool) -> None:
    problem = shape.problem
    parts = plan.whole_parts(problem, rank)
    needed = plan.count(plan.needed_tokens(problem, rank))
    others = [r for r in range(problem.ranks) if r != rank]
    routes = [plan.routes(problem, other, rank) for other in others]
    comes = shape.of_keys(sum(_length(place) for route in routes for _, place in route))
    rows = shape.batch * shape.rows * (shape.heads // shape.key_heads) // 2
    shares = [
        (stop - start) / shape.key_heads for start, stop in plan.head_groups(rows, shape.key_heads)
    ]
    own = shape.of_keys(shape.rows // shape.batch)

    def start(share: float) -> float:
        """Own rows of some heads are put together, sent, and copied to where the others' come."""
        timeline.move(2 * share * own)
        arrives = timeline.send(share * comes, problem.ranks)
        timeline.move(2 * share * own)
        return arrives

    for of_pass in ("forward", "backward") if backward else ("forward",):
        products, rate = (2, machine.forward) if of_pass == "forward" else (5, machine.backward)
        arrives = start(shares[0])
        returned = 0.0
        for number, share in enumerate(shares):
            timeline.wait(arrives)
            if number + 1 < len(shares):
                arrives = start(shares[number + 1])
            for part in parts:
                timeline.compute(share * _operations(shape, (part,), products), rate)
            if of_pass == "backward":
                timeline.wait(returned)
                returned = timeline.send(2 * share * comes, problem.ranks)
        timeline.wait(returned)
        # Outputs to their heads; or sums of gradients, and rounding.
        if of_pass == "forward":
            timeline.move(shape.of_queries(shape.rows // shape.batch, 4))
        else:
            timeline.move(2 * 3 * comes + 5 * shape.of_keys(needed))
            timeline.move(shape.of_queries(shape.rows // shape.batch, 10))


def _all_to_all(
    timeline: _Timeline, shape: Shape, shared: int, machine: Machine, backward: bool
) -> None:
    """Nothing is computed meanwhile."""
    rows = shape.rows // shape.batch // shared
    all_bytes = 2 * shape.of_queries(rows) + shape.of_keys(rows)
    rate = machine.exchange if shared <= machine.node else machine.between
    for _ in range(2 if backward else 1):
        timeline.now += all_bytes * (1 - 1 / shared) / rate
        timeline.move(4 * all_bytes)


def _length(interval: Interval) -> int:
    return interval[1] - interval[0]
