"""Times attention to paged caches against FlashAttention-3 and FlashMLA of vLLM, and against a sum
of as many bytes. Keys and values come cold: a graph goes round copies of the cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import comparison, report, session, vllm_library
from bench.cache_cells import FLASHMLA, GRIDS, SUM, VLLM, CacheCell
from bench.cells import NORMAL, cell_name, on_data
from bench.distributions import chosen

PEERS = (VLLM, FLASHMLA)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "caches")
    session.add_data_option(parser)
    session.add_only_option(parser)
    parser.add_argument(
        "--grid",
        nargs="+",
        choices=GRIDS,
        default=["decode"],
        help="one query token and a few; chunks of prompts; some dozen tokens; latent attention; "
        "8 bits",
    )
    vllm_library.add_option(parser)
    parser.add_argument(
        "--flashmla-library",
        type=Path,
        metavar="PATH",
        help="_flashmla_C.abi3.so of vLLM, for the peer flashmla; default: what "
        f"{vllm_library.FLASHMLA_VARIABLE} names",
    )
    # The whole of a grid is to take a minute.
    parser.set_defaults(rounds=7, target_ms=1.5)
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace, grid: str) -> dict[str, Any]:
    from bench import cache_inputs, cache_providers, measure

    loaded, missing = cache_providers.load(arguments.vllm_library, arguments.flashmla_library)
    task = measure.Task(
        cache_inputs.cache_inputs, cache_inputs.CacheReference, cache_inputs.CapturedRound
    )
    record = session.Record("caches", arguments.out / f"caches_{grid}.json", arguments)
    data = record.data
    data["grid"] = grid
    data["providers"] = comparison.describe(loaded, missing)
    data["cells"] = []
    cells = [cell for cell in GRIDS[grid](dtype=arguments.dtype) if arguments.only in cell.name]
    # Latent attention has no keys and values to draw apart
    cells = on_data(cells, chosen([NORMAL] if grid == "latent" else arguments.data))
    for number, cell in enumerate(cells, start=1):
        timed = measure.time_cell(cell, loaded, arguments.rounds, arguments.target_ms, task)
        entry = record.add(cell, with_bandwidth(cell, timed))
        session.say(
            f"[{number}/{len(cells)}] {cell}: ours {report.shown_us(entry, report.OURS)} us, "
            f"ratio {report.show(report.ratio(entry, PEERS), 2)}"
        )
    record.save()
    session.say(f"wrote {record.path}")
    return data


def with_bandwidth(cell: CacheCell, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each result with the TB/s of K and V that it stands for."""
    for result in results.values():
        if "median_ms" in result:
            result["tb_s"] = cell.bytes / result["median_ms"] / 1e9
    return results


def table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Ours, then microseconds of the others, speed over the best peer's and over the sum's."""
    others = [name for name in data["providers"] if name != report.OURS]
    others = [n for n in others if any(n in entry["results"] for entry in data["cells"])]
    variants = [name for name in others if name.startswith(report.OURS)]
    header = ["cell", "ours us", "TB/s", "TFLOP/s", *(f"{name} us" for name in others)]
    header += [f"{name}/best" for name in (report.OURS, *variants)] + ["ours/sum"]
    rows = []
    for entry in data["cells"]:
        mine = entry["results"].get(report.OURS, {})
        ratios = [report.ratio(entry, PEERS, name) for name in (report.OURS, *variants)]
        ratios.append(report.ratio(entry, [SUM]))
        rows.append(
            [
                cell_name(entry),
                report.shown_us(entry, report.OURS),
                report.show(mine.get("tb_s"), 2),
                report.show(mine.get("tflops")),
                *(report.shown_us(entry, name) for name in others),
                *(report.show(ratio, 2) for ratio in ratios),
            ]
        )
    return header, rows


def print_summary(data: dict[str, Any]) -> None:
    machine = data["machine"]
    print(
        f"{machine['gpu']}, torch {machine['torch']}, commit {data['commit']}\n\n"
        f"{data['grid']}: causal, {data['settings']['dtype']}, 64/8 heads of 128 and pages of 64 "
        "where nothing else is said; keys and values cold"
    )
    print(report.text_table(*table(data)))
    for line in report.failures(data):
        print(line)


def main() -> int:
    arguments = parse()
    session.require_gpu()
    runs = [run(arguments, grid) for grid in dict.fromkeys(arguments.grid)]
    for data in runs:
        print_summary(data)
    return int(any(comparison.failed(data) for data in runs))


if __name__ == "__main__":
    sys.exit(main())
