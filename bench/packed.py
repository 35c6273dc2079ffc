"""Times packed sequences, windows and other head dims, forward or backward, against
FlashAttention-3 in two libraries: vLLM's build (forward) and xformers' (both)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import comparison, fa3_library, report, session, vllm_library
from bench.cells import cell_name
from bench.packed_cells import packed_grid


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "packed")
    session.add_data_option(parser)
    session.add_only_option(parser)
    parser.add_argument("--backward", action="store_true", help="gradients, forward not timed")
    vllm_library.add_option(parser)
    parser.add_argument(
        "--fa3-library",
        type=Path,
        metavar="PATH",
        help="_C.so of FlashAttention-3 inside xformers, for the peer fa3-xformers; default: "
        f"what {fa3_library.VARIABLE} names",
    )
    # A graph of 1.5 ms holds dozens of the short calls; the whole grid is to take a minute.
    parser.set_defaults(rounds=7, target_ms=1.5, host_batches=0, only_host=False)
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from bench import measure, packed_inputs, packed_providers, providers

    loaded, missing = packed_providers.load(
        arguments.backward, arguments.fa3_library, arguments.vllm_library
    )
    inputs, reference = packed_inputs.packed_inputs, packed_inputs.PackedReference
    repeated = measure.FORWARD.repeated
    suffix = ""
    if arguments.backward:
        loaded = [providers.backward_of(provider) for provider in loaded]
        inputs = packed_inputs.packed_inputs_and_gradient
        reference = packed_inputs.PackedGradientReference
        repeated = measure.BACKWARD.repeated
        suffix = "_backward"
    task = measure.Task(inputs, reference, repeated)
    path = arguments.out / f"packed{suffix}_{arguments.dtype}.json"
    grid = packed_grid(arguments.dtype, arguments.backward)
    grid = [cell for cell in grid if arguments.only in cell.name]
    record = session.Record("packed", path, arguments)
    return comparison.run(record, arguments, grid, loaded, [], missing, task)


def table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """TFLOP/s and microseconds of ours, TFLOP/s of the others, then speed over the best peer's."""
    peers = report.peers_of(data)
    others = [name for name in data["providers"] if name != report.OURS]
    others = [n for n in others if any(n in entry["results"] for entry in data["cells"])]
    ratios = [report.OURS, *(name for name in others if name not in peers)]
    header = ["cell", "ours us", "ours", *others, *(f"{name}/best" for name in ratios)]
    rows = [
        [
            cell_name(entry),
            report.shown_us(entry, report.OURS),
            *(report.shown(entry, name) for name in (report.OURS, *others)),
            *(report.show(report.ratio(entry, peers, name), 2) for name in ratios),
        ]
        for entry in data["cells"]
    ]
    return header, rows


def print_summary(data: dict[str, Any]) -> None:
    machine = data["machine"]
    what = "backward" if data["settings"]["backward"] else "forward"
    print(
        f"{machine['gpu']}, torch {machine['torch']}, commit {data['commit']}, "
        f"cuBLAS bf16 8192^3 {machine['cublas_bf16']['tflops']:.0f} TFLOP/s"
    )
    print(f"\nTFLOP/s, {what}, causal, {data['settings']['dtype']}")
    print(report.text_table(*table(data)))
    for line in report.failures(data):
        print(line)


def main() -> int:
    arguments = parse()
    session.require_gpu()
    data = run(arguments)
    print_summary(data)
    return int(comparison.failed(data))


if __name__ == "__main__":
    sys.exit(main())
