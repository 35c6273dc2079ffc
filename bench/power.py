"""What clock and power a GPU settles at under each forward kernel alone, and what that costs.

Other benchmarks let the candidates take turns, so that all run at one clock. Here each has the GPU
to itself for seconds: a kernel that spends less energy on an operation then runs at a higher clock.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from bench import comparison, report, session
from bench.cells import Cell, cell_name, paper_grid

SAMPLED = ("power.draw.instant", "clocks.sm")
SAMPLE_MS = 100
DENSE_FLOPS_A_CLOCK = 4096  # of a Hopper multiprocessor's tensor cores, 16-bit operands


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "power", replays=False)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each kernel in each cell")
    parser.add_argument("--peers", nargs="*", default=["sdpa-cudnn", "fa3-fwd"], metavar="NAME")
    session.add_grid_options(parser)
    parser.set_defaults(seqlens=[16384], masks=["full"])
    return parser.parse_args(arguments)


def parse_samples(lines: Iterable[str]) -> list[tuple[float, float]]:
    """(watts, MHz) of nvidia-smi's lines; what it could not read is left out."""
    samples = []
    for line in lines:
        try:
            watts, mhz = (float(field) for field in line.split(","))
        except ValueError:
            continue
        samples.append((watts, mhz))
    return samples


@contextmanager
def sampled() -> Iterator[list[tuple[float, float]]]:
    """Fills the list with what nvidia-smi reads meanwhile."""
    import torch

    reader = subprocess.Popen(
        [
            "nvidia-smi",
            f"--id={torch.cuda.current_device()}",
            f"--query-gpu={','.join(SAMPLED)}",
            "--format=csv,noheader,nounits",
            f"--loop-ms={SAMPLE_MS}",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    samples: list[tuple[float, float]] = []
    try:
        yield samples
    finally:
        reader.terminate()
        samples += parse_samples(reader.communicate()[0].splitlines())


def settle(
    cell: Cell, milliseconds: float, samples: list[tuple[float, float]], multiprocessors: int
) -> dict[str, float]:
    """What a kernel is like when clock and power have settled: from the second half of samples."""
    settled = samples[len(samples) // 2 :]
    if not settled:
        raise ValueError("nvidia-smi gave no sample")
    watts = statistics.fmean(sample[0] for sample in settled)
    mhz = statistics.fmean(sample[1] for sample in settled)
    tflops = cell.tflops(milliseconds)
    return {
        "tflops": tflops,
        "watts": watts,
        "clock_mhz": mhz,
        "joules_per_tflop": watts / tflops,
        "tensor_share": tflops * 1e6 / (multiprocessors * DENSE_FLOPS_A_CLOCK * mhz),
    }


def time_alone(call, seconds: float) -> tuple[float, list[tuple[float, float]]]:
    """Milliseconds of a replay's call in the second half of the time, and samples of all of it."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    with sampled() as samples:
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            begin.record()
            call.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / call.calls)
    return statistics.fmean(times[len(times) // 2 :]), samples


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from bench import measure, providers
    from bench.check import Reference
    from bench.timing import CapturedCall

    peers, missing = providers.load_peers(arguments.peers)
    candidates = [providers.ours(), *peers]
    record = session.Record("power", arguments.out / f"power_{arguments.dtype}.json", arguments)
    record.data |= {"providers": comparison.describe(candidates, missing), "cells": []}
    multiprocessors = record.data["machine"]["multiprocessors"]
    for cell in paper_grid(
        arguments.dtype, arguments.head_dims, arguments.masks, arguments.seqlens
    ):
        inputs = measure.random_inputs(cell)
        reference = Reference(cell, *inputs)
        results = {}
        for provider in candidates:
            if not provider.takes(cell):
                continue
            call, _ = measure.check_provider(provider, cell, inputs, reference)
            with provider.context():
                captured = CapturedCall(call, target_ms=20.0)
            results[provider.name] = settle(
                cell, *time_alone(captured, arguments.seconds), multiprocessors
            )
        record.add(cell, results)
        session.say(f"{cell}: {len(results)} kernels")
    session.say(f"wrote {record.path}")
    return record.data


def table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["cell", "kernel", "TFLOP/s", "W", "MHz", "J/TFLOP", "tensor cores"]
    lines = []
    for cell in data["cells"]:
        for name, result in cell["results"].items():
            numbers = [
                report.show(result[field], digits)
                for field, digits in (
                    ("tflops", 0),
                    ("watts", 0),
                    ("clock_mhz", 0),
                    ("joules_per_tflop", 2),
                    ("tensor_share", 2),
                )
            ]
            lines.append([cell_name(cell), name, *numbers])
    return header, lines


def main() -> int:
    arguments = parse()
    session.require_gpu()
    data = run(arguments)
    print(report.text_table(*table(data)))
    for line in report.failures(data):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
