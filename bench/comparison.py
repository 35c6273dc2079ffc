"""What the comparisons with peers share: options, the run over a grid, the summary."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import fa3_library, report, session
from bench.cells import Cell, cell_name, on_data
from bench.distributions import chosen

QUICK = {"head_dims": [128], "seqlens": [2048, 16384]}
KINDS = {"forward": "Forward", "backward": "Backward"}
HOST_CALL = {"forward": "one small call", "backward": "forward and backward of a small call"}


def host_cell(dtype: str) -> Cell:
    return Cell(dtype=dtype, mask="full", batch=1, seqlen=128, heads=16, head_dim=128)


def parser(description: str, kind: str, peers: Iterable[str]) -> argparse.ArgumentParser:
    result = session.parser(description, kind)
    session.add_grid_options(result)
    session.add_data_option(result)
    peers = tuple(peers)
    result.add_argument("--peers", nargs="*", choices=peers, default=list(peers))
    result.add_argument(
        "--host-peers", nargs="*", choices=peers, default=[], help="more peers of the host time"
    )
    result.add_argument(
        "--tile-config",
        action="append",
        default=[],
        metavar="NAME",
        help=f"also time this {kind} row of our table (repeatable)",
    )
    result.add_argument(
        "--fa4-seqlens",
        type=int,
        nargs="+",
        default=[],
        metavar="S",
        help="time FA4 at these lengths only (it compiles once for each head dim and mask)",
    )
    result.add_argument(
        "--fa3-library",
        type=Path,
        metavar="PATH",
        help="the _C.so of FlashAttention-3 inside xformers, for the peer fa3-xformers; default: "
        f"what {fa3_library.VARIABLE} names",
    )
    result.add_argument(
        "--host-batches", type=int, default=40, help="batches of 100 calls; 0: no host time"
    )
    result.add_argument("--quick", action="store_true", help="D=128 at S=2k and 16k, ten rounds")
    result.add_argument(
        "--only-host", action="store_true", help="host time of a small call and nothing else"
    )
    return result


def apply_quick(arguments: argparse.Namespace) -> argparse.Namespace:
    if arguments.quick:
        arguments.head_dims, arguments.seqlens = QUICK["head_dims"], QUICK["seqlens"]
        arguments.rounds = 10
    return arguments


def load_peers(arguments: argparse.Namespace) -> tuple[list[Any], list[Any], dict[str, str]]:
    """The peers to time, those of the host time alone, and why others are missing."""
    from bench import providers

    options = {"fa4_seqlens": arguments.fa4_seqlens, "fa3_library": arguments.fa3_library}
    peers, missing = providers.load_peers(arguments.peers, **options)
    host_peers, missing_on_host = providers.load_peers(arguments.host_peers, **options)
    return peers, host_peers, missing | missing_on_host


def describe(loaded: Iterable[Any], missing: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What the record says of the providers."""
    described: dict[str, dict[str, Any]] = {
        p.name: {"label": p.label, "version": p.version} for p in loaded
    }
    for name, reason in missing.items():
        described[name] = {"label": name, "missing": reason}
    return described


def progress(number: int, total: int, entry: dict[str, Any], cell: Cell, peers: list[str]) -> None:
    best = report.best_peer(entry, peers)
    against = "no peer" if best is None else f"best peer {best[0]} {best[1]:.0f}"
    mine, ratio = report.tflops(entry, report.OURS), report.ratio(entry, peers)
    session.say(
        f"[{number}/{total}] {cell}: ours {report.show(mine)} TFLOP/s, {against}, "
        f"ratio {report.show(ratio, 2)}"
    )


def run(
    record: session.Record,
    arguments: argparse.Namespace,
    grid: list[Cell],
    providers: list[Any],
    host_providers: list[Any],
    missing: dict[str, str],
    task: Any,
) -> dict[str, Any]:
    """Host time of a small call, then every cell of the grid, saved as it goes."""
    from bench import measure

    data = record.data
    data["providers"] = describe([*providers, *host_providers], missing)
    data["cells"] = []
    data["machine"]["cublas_bf16"] = measure.time_cublas(session.query_gpu)
    if arguments.host_batches:
        cell = host_cell(arguments.dtype)
        session.say(f"host time of {HOST_CALL[data['kind']]}")
        timed = measure.time_host(cell, host_providers, arguments.host_batches, task)
        data["host"] = {**cell.as_dict(), "results": timed}
        record.save()
    grid = [] if arguments.only_host else on_data(grid, chosen(arguments.data))
    for number, cell in enumerate(grid, start=1):
        timed = measure.time_cell(cell, providers, arguments.rounds, arguments.target_ms, task)
        entry = record.add(cell, timed)
        progress(number, len(grid), entry, cell, report.peers_of(data))
    record.save()
    session.say(f"wrote {record.path}")
    return data


def print_summary(data: dict[str, Any]) -> None:
    machine, kind = data["machine"], data["kind"]
    print(
        f"{machine['gpu']}, torch {machine['torch']}, "
        f"cuBLAS bf16 8192^3 {machine['cublas_bf16']['tflops']:.0f} TFLOP/s"
    )
    if data["cells"]:
        print(f"\nTFLOP/s, {kind}, {data['settings']['dtype']}")
        print(report.text_table(*report.cell_rows(data)))
        peers = report.peers_of(data)
        print("\nours / best peer, geometric mean on N(0, 1)")
        print(report.show_means(report.ratio_means(data), 3))
        print("\nours / best peer, lowest of any length, by data")
        print(report.text_table(*report.lowest_rows(data, peers)))
        for name, means in report.variant_means(data).items():
            print(f"\ntime of {name} / ours, geometric mean")
            print(report.show_means(means, 3))
            worst = report.lowest(data["cells"], peers, name)
            print(f"{name} / best peer, lowest: {report.show_lowest(worst, cell_name)}")
    if "host" in data:
        print(f"\nhost time of {HOST_CALL[kind]} (1, 128, 16, 128), us")
        print(report.text_table(*report.host_row(data)))
    for line in report.failures(data):
        print(line)


def failed(data: dict[str, Any]) -> bool:
    """Whether ours was wrong or did not run anywhere."""
    cells = [*data["cells"], *([data["host"]] if "host" in data else [])]
    return any("error" in entry["results"].get(report.OURS, {}) for entry in cells)
