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


def gpu_seconds(call: Call) -> float:
    """Of one of several calls in a CUDA graph, so that the host's time does not count."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / CALLS
