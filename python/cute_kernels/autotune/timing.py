"""How long calls take: several in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
Timer = Callable[[Call], float]

ROUNDS = 9
CALLS = 10  # of a sample of the GPU's time


def measure(
    calls: Mapping[str, Call], timer: Timer, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of a call in each of the rounds, in which all take turns, by name, the fastest by the
    median first. Every second round goes backwards: nobody always runs behind the same other one.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            samples[name].append(timer(calls[name]))
    return dict(sorted(samples.items(), key=lambda item: statistics.median(item[1])))


class GpuTimer:
    """Seconds of a call on the GPU: of one of several in a CUDA graph, so that the host's time does
    not count. A call is captured once, which takes longer than its samples."""

    def __init__(self) -> None:
        self._graphs: dict[Call, torch.cuda.CUDAGraph] = {}

    def __call__(self, call: Call) -> float:
        if call not in self._graphs:
            self._graphs[call] = _captured(call)
        graph = self._graphs[call]
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        graph.replay()  # whatever ran before has left caches and clocks as it did
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / CALLS


def _captured(call: Call) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph
