"""What pingpong scheduling and the overlap inside a warpgroup are worth, with the tile held fixed.

Needs a build that holds the four variants of a tile:
    pip install --no-build-isolation -v . \\
        -C cmake.define.CUTE_KERNELS_TILE_CONFIGS=bench/tiles/ablation.toml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from bench import report, session
from bench.cells import MASKS, Cell, paper_cell

SWITCHES = ("pingpong", "overlap")
PAPER_TABLE_CELL = {"batch": 4, "seqlen": 8448, "heads": 16, "head_dim": 128}


def variant(row: dict[str, Any]) -> str:
    """What a row switches on, in words."""
    return " + ".join(switch for switch in SWITCHES if row.get(switch)) or "neither"


def ablation_cells(
    dtype: str, head_dim: int, seqlens: Iterable[int], masks: Iterable[str]
) -> list[Cell]:
    """Cells of the paper's grid, and for head dim 128 the one cell of its own ablation."""
    masks = tuple(masks)
    cells = [paper_cell(dtype, head_dim, mask, s) for mask in masks for s in seqlens]
    if head_dim == PAPER_TABLE_CELL["head_dim"]:
        cells += [Cell(dtype=dtype, mask=mask, **PAPER_TABLE_CELL) for mask in masks]
    return cells


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "ablation")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2048, 16384], metavar="S")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="rows of the table (default: all of the head dim)"
    )
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from bench import measure, providers

    rows = [
        row
        for row in providers.tile_rows()
        if row["dtype"] == arguments.dtype
        and row["head_dim"] == arguments.head_dim
        and (arguments.rows is None or row["name"] in arguments.rows)
    ]
    candidates = [providers.ours(row["name"], row["name"]) for row in rows]
    record = session.Record(
        "ablation", arguments.out / f"ablation_{arguments.dtype}.json", arguments
    )
    record.data |= {"rows": rows, "cells": []}
    record.data["machine"]["cublas_bf16"] = measure.time_cublas(session.query_gpu)
    cells = ablation_cells(arguments.dtype, arguments.head_dim, arguments.seqlens, arguments.masks)
    for number, cell in enumerate(cells, start=1):
        timed = measure.time_cell(cell, candidates, arguments.rounds, arguments.target_ms)
        record.add(cell, timed)
        session.say(f"[{number}/{len(cells)}] {cell}, batch {cell.batch}: {len(timed)} rows")
    session.say(f"wrote {record.path}")
    return record.data


def table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One line a row of the tile table, one column a cell, TFLOP/s."""
    cells = data["cells"]
    header = ["switches", "tile"]
    header += [f"{c['mask']} {c['batch']}x{c['seqlen']}" for c in cells]
    lines = []
    for row in data["rows"]:
        tile = f"{row['tile_m']}x{row['tile_n']}x{row['stages']}"
        speeds = [report.show(report.tflops(cell, row["name"])) for cell in cells]
        if any(speed != "-" for speed in speeds):
            lines.append([variant(row), tile, *speeds])
    return header, lines


def main() -> int:
    arguments = parse()
    session.require_gpu()
    data = run(arguments)
    print("TFLOP/s, forward, columns: mask batch x seqlen")
    print(report.text_table(*table(data)))
    for line in report.failures(data):
        print(line)
    return 0 if any("tflops" in r for c in data["cells"] for r in c["results"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
