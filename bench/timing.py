"""GPU time by CUDA-graph replay, host time by a wall clock; always several candidates in turn.

The candidates of a comparison take turns, because a GPU under load changes its clock: what runs in
one block of time is not comparable with what runs in another. And nobody always runs behind the
same other one, which may leave the GPU hotter than others do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

Call = Callable[[], object]
ContextFactory = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))


WARM_UP_CALLS = 3
MOST_CALLS = 64


def calls_that_take(target_ms: float, call: Call) -> int:
    """How often to call for about `target_ms` of GPU time."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles what is compiled at run time
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(WARM_UP_CALLS):
            call()
        end.record()
    torch.cuda.synchronize()
    estimate = max(begin.elapsed_time(end) / WARM_UP_CALLS, 1e-3)
    return max(1, min(MOST_CALLS, round(target_ms / estimate)))


class CapturedCall:
    """`call`, recorded so often into one CUDA graph that a replay takes about `target_ms`."""

    how = "graph"

    def __init__(self, call: Call, target_ms: float = 4.0):
        import torch

        self.calls = calls_that_take(target_ms, call)
        self._call = call  # owns what the graph reads
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(self.calls):
                call()
        self._graph.replay()
        torch.cuda.synchronize()

    def replay(self) -> None:
        self._graph.replay()


class EagerCall:
    """`call`, repeated from the host, for what cannot be captured. Its time is the GPU's only where
    the GPU is slower than the host."""

    how = "eager"

    def __init__(self, call: Call, target_ms: float = 4.0):
        self.calls = calls_that_take(target_ms, call)
        self._call = call

    def replay(self) -> None:
        for _ in range(self.calls):
            self._call()


def captured_or_eager(call: Call, target_ms: float = 4.0) -> CapturedCall | EagerCall:
    import torch

    try:
        return CapturedCall(call, target_ms)
    except RuntimeError:
        torch.cuda.synchronize()
        return EagerCall(call, target_ms)


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round. In as many rounds as there are names, twice as many if that is odd,
    every name comes first equally often and follows every other equally often (Williams, 1949).
    """
    count = len(names)
    zigzag = [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(count)]  # 0, 1, -1, 2, -2, ...
    for turn in range(rounds):
        order = [names[(place + turn) % count] for place in zigzag]
        yield order[::-1] if count % 2 and turn // count % 2 else order


def interleaved_gpu_times(
    captured: Mapping[str, CapturedCall | EagerCall], rounds: int
) -> dict[str, Spread]:
    """Milliseconds of one call of each candidate."""
    import torch

    names = list(captured)
    events: dict[str, list] = {name: [] for name in names}
    for name in names:  # bring the clock to what this load leaves it
        captured[name].replay()
    for order in turns(names, rounds):
        for name in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            captured[name].replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: Spread.of([b.elapsed_time(e) / captured[name].calls for b, e in pairs])
        for name, pairs in events.items()
    }


def interleaved_host_times(
    calls: Mapping[str, tuple[Call, ContextFactory]], rounds: int, calls_per_batch: int = 100
) -> dict[str, Spread]:
    """Microseconds of host time of one call, from batches of calls with no wait between them."""
    import torch

    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn, order in enumerate(turns(names, 1 + rounds)):  # turn 0 warms up
        for name in order:
            call, context = calls[name]
            torch.cuda.synchronize()
            with context():
                begin = time.perf_counter()
                for _ in range(calls_per_batch):
                    call()
                elapsed = time.perf_counter() - begin
            if turn > 0:
                samples[name].append(elapsed / calls_per_batch * 1e6)
    torch.cuda.synchronize()
    return {name: Spread.of(values) for name, values in samples.items()}
