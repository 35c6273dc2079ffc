"""Ranks the tile configs of the installed build, row against row, in every cell of a grid.

Each row is first checked on small shapes whose lengths are no multiple of a tile; one that fails is
not timed.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from bench import report, session
from bench.cells import Cell, paper_grid

AUTOMATIC = report.OURS
CHECK_SEQLENS = (113, 1000)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "search")
    session.add_grid_options(parser)
    parser.add_argument(
        "--match", default="", metavar="REGEX", help="only the rows whose name matches"
    )
    parser.add_argument("--top", type=int, default=3, help="rows shown for each head dim and mask")
    return parser.parse_args(arguments)


def check_cells(dtype: str, head_dim: int, mask: str) -> list[Cell]:
    return [
        Cell(dtype=dtype, mask=mask, batch=2, seqlen=s, heads=3, head_dim=head_dim)
        for s in CHECK_SEQLENS
    ]


def rank(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each head dim and mask the candidates, fastest first by geometric mean of TFLOP/s.

    A candidate that was not timed in every cell of its group is left out. `gain` is its mean over
    the automatic choice's.
    """
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["head_dim"], cell["mask"]), []).append(cell)
    ranking = []
    for (head_dim, mask), members in groups.items():
        names = {name for cell in members for name in cell["results"]}
        means = {}
        for name in names:
            speeds = [report.tflops(cell, name) for cell in members]
            if all(speed is not None for speed in speeds):
                means[name] = report.geometric_mean(speeds)
        automatic = means.get(AUTOMATIC)
        order = sorted(means, key=lambda name: -means[name])
        ranking.append(
            {
                "head_dim": head_dim,
                "mask": mask,
                "candidates": [
                    {
                        "name": name,
                        "mean_tflops": means[name],
                        "gain": means[name] / automatic if automatic else None,
                    }
                    for name in order
                ],
                "best_by_seqlen": {str(cell["seqlen"]): _fastest(cell) for cell in members},
            }
        )
    return ranking


def _fastest(cell: dict[str, Any]) -> str | None:
    speeds = {name: report.tflops(cell, name) for name in cell["results"] if name != AUTOMATIC}
    timed = {name: speed for name, speed in speeds.items() if speed is not None}
    return max(timed, key=lambda name: timed[name], default=None)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from bench import measure, providers

    rows = [
        row
        for row in providers.tile_rows()
        if row["dtype"] == arguments.dtype
        and row["head_dim"] in arguments.head_dims
        and re.search(arguments.match, row["name"])
    ]
    record = session.Record("search", arguments.out / f"search_{arguments.dtype}.json", arguments)
    data = record.data
    data |= {"rows": rows, "cells": [], "rejected": {}}
    data["machine"]["cublas_bf16"] = measure.time_cublas(session.query_gpu)
    candidates = []
    for row in rows:
        provider = providers.ours(row["name"], row["name"])
        masks = [mask for mask in arguments.masks if row["mask"] in ("any", mask)]
        small = [c for mask in masks for c in check_cells(row["dtype"], row["head_dim"], mask)]
        wrong = [
            f"{cell}: {result['error']}"
            for cell in small
            for result in measure.check_cell(cell, [provider]).values()
            if "error" in result
        ]
        if wrong:
            data["rejected"][row["name"]] = wrong
        elif masks:
            candidates.append(provider)
    session.say(f"{len(candidates)} rows pass the checks, {len(data['rejected'])} do not")
    candidates.append(providers.ours())
    grid = paper_grid(arguments.dtype, arguments.head_dims, arguments.masks, arguments.seqlens)
    for number, cell in enumerate(grid, start=1):
        timed = measure.time_cell(cell, candidates, arguments.rounds, arguments.target_ms)
        entry = {**cell.as_dict(), "results": timed}
        data["cells"].append(entry)
        data["ranking"] = rank(data["cells"])
        record.save()
        fastest = _fastest(entry)
        speed = None if fastest is None else report.tflops(entry, fastest)
        session.say(f"[{number}/{len(grid)}] {cell}: {fastest} {report.show(speed)} TFLOP/s")
    session.say(f"wrote {record.path}")
    return data


def table(data: dict[str, Any], top: int) -> tuple[list[str], list[list[str]]]:
    seqlens = sorted({cell["seqlen"] for cell in data["cells"]})
    header = ["head dim, mask, row", "mean", "gain", *(f"S={s}" for s in seqlens)]
    lines = []
    for group in data["ranking"]:
        members = [
            cell
            for cell in data["cells"]
            if (cell["head_dim"], cell["mask"]) == (group["head_dim"], group["mask"])
        ]
        by_seqlen = {cell["seqlen"]: cell for cell in members}
        for candidate in group["candidates"][:top]:
            name = candidate["name"]
            shown = "automatic" if name == AUTOMATIC else name
            lines.append(
                [
                    f"D={group['head_dim']} {group['mask']} {shown}",
                    report.show(candidate["mean_tflops"]),
                    report.show(candidate["gain"], 3),
                    *(
                        report.show(report.tflops(by_seqlen[s], name) if s in by_seqlen else None)
                        for s in seqlens
                    ),
                ]
            )
    return header, lines


def main() -> int:
    arguments = parse()
    session.require_gpu()
    data = run(arguments)
    if data["cells"]:
        print(report.text_table(*table(data, arguments.top)))
    for name, reasons in data["rejected"].items():
        print(f"rejected {name}: {reasons[0]}")
    for line in report.failures(data):
        print(line)
    return 1 if data["rejected"] else 0


if __name__ == "__main__":
    sys.exit(main())
