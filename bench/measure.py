"""One cell, all candidates: make the data, check every output, capture, time in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.cells import NORMAL, Cell
from bench.check import Reference
from bench.check_backward import GradientReference
from bench.distributions import draw
from bench.providers import Provider
from bench.timing import (
    Call,
    CapturedCall,
    EagerCall,
    Spread,
    captured_or_eager,
    interleaved_gpu_times,
    interleaved_host_times,
)

Results = dict[str, dict[str, Any]]


class WrongResult(Exception):
    """An output outside the tolerance."""


def random_inputs(cell: Cell) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v; never zeros, which a GPU multiplies at less power and so faster."""
    return draw(cell)


def random_inputs_and_gradient(cell: Cell) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the output, which is always N(0, 1)."""
    return *draw(cell), draw(replace(cell, data=NORMAL), seed=1)[0]


@dataclass(frozen=True)
class Task:
    """What is asked of every provider in a cell: on which inputs, right by which reference."""

    inputs: Callable[[Cell], tuple[torch.Tensor, ...]]
    reference: Callable[..., Any]
    repeated: Callable[[Call, float], CapturedCall | EagerCall]


FORWARD = Task(random_inputs, Reference, CapturedCall)
BACKWARD = Task(random_inputs_and_gradient, GradientReference, captured_or_eager)


def _poison_free_memory(like: torch.Tensor) -> None:
    """Fill the blocks that the next outputs get with NaN, so that an unwritten element shows."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(4)]
    del blocks


def check_provider(
    provider: Provider, cell: Cell, inputs, reference
) -> tuple[Callable[[], object], dict[str, Any]]:
    """The provider's call on these inputs, after its output has passed; its errors with it. A call
    on other numbers than these has a `reference` of its own."""
    call = provider.bind(cell, *inputs)
    reference = getattr(call, "reference", None) or reference
    _poison_free_memory(inputs[0])
    with provider.context():
        out = provider.output(call())
        error = reference.error(out)
    if error > reference.tolerance:
        raise WrongResult(f"error {error:.3g} is above the tolerance {reference.tolerance:.3g}")
    errors = {"max_error": error, "tolerance": reference.tolerance, "rmse": reference.rmse(out)}
    return call, errors


def _failure(error: Exception) -> dict[str, str]:
    lines = str(error).strip().splitlines()
    return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]}


def time_cell(
    cell: Cell,
    providers: Iterable[Provider],
    rounds: int,
    target_ms: float,
    task: Task = FORWARD,
    others: Mapping[str, Task] | None = None,
) -> Results:
    """GPU time of every provider that takes the cell; one that fails is recorded, not timed.

    `others`: tasks on the same inputs of providers, by name, of whom something else is asked.
    """
    results: Results = {}
    captured: dict[str, CapturedCall | EagerCall] = {}
    with torch.no_grad():
        inputs = task.inputs(cell)
        references: dict[Callable[..., Any], Any] = {}
        for provider in providers:
            if not provider.takes(cell):
                continue
            asked = (others or {}).get(provider.name, task)
            if asked.reference not in references:
                references[asked.reference] = asked.reference(cell, *inputs)
            try:
                call, errors = check_provider(provider, cell, inputs, references[asked.reference])
                with provider.context():
                    captured[provider.name] = asked.repeated(call, target_ms)
                results[provider.name] = errors
            except Exception as failure:
                results[provider.name] = _failure(failure)
        if captured:
            for name, spread in interleaved_gpu_times(captured, rounds).items():
                results[name] |= _milliseconds(cell, spread)
                results[name]["calls_per_round"] = captured[name].calls
                results[name]["timed_by"] = captured[name].how
    return results


def _milliseconds(cell: Cell, spread: Spread) -> dict[str, Any]:
    return {
        "median_ms": spread.median,
        "quartiles_ms": [spread.lower, spread.upper],
        "rounds": spread.count,
        "tflops": cell.tflops(spread.median),
    }


def time_host(
    cell: Cell, providers: Iterable[Provider], rounds: int, task: Task = FORWARD
) -> Results:
    """Host time of one small call of every provider, no graph, nothing waited for."""
    results: Results = {}
    calls = {}
    with torch.no_grad():
        inputs = task.inputs(cell)
        reference = task.reference(cell, *inputs)
        for provider in providers:
            try:
                call, _ = check_provider(provider, cell, inputs, reference)
                calls[provider.name] = (call, provider.context)
            except Exception as failure:
                results[provider.name] = _failure(failure)
        if calls:
            for name, spread in interleaved_host_times(calls, rounds).items():
                results[name] = {
                    "median_us": spread.median,
                    "quartiles_us": [spread.lower, spread.upper],
                    "batches": spread.count,
                }
    return results


def time_cublas(query: Callable[[], dict[str, str]], rounds: int = 15) -> dict[str, Any]:
    """A yardstick for the card and its power state: bf16 8192^3; `query` runs under its load."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    captured = CapturedCall(lambda: a @ b)
    spread = interleaved_gpu_times({"cublas": captured}, rounds)["cublas"]
    for _ in range(250):  # about a second of work in the queue
        captured.replay()
    under_load = query()
    torch.cuda.synchronize()
    return {
        "shape": [size, size, size],
        "median_ms": spread.median,
        "quartiles_ms": [spread.lower, spread.upper],
        "tflops": 2 * size**3 / spread.median / 1e9,
        "nvidia_smi": under_load,
    }
