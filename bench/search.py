"""Times all rows of the installed build that take a cell, in every cell of a grid, and new ones of
the tuner's search space if asked to: `cute_kernels.tune`, which is told to keep nothing.

`python -m cute_kernels plot` draws the JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

from bench import report, session
from bench.cells import paper_grid
from bench.distributions import draw

PASSES = ("forward", "backward", "forward_fp8")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "search", replays=False)
    session.add_grid_options(parser)
    parser.add_argument("--pass", dest="of_pass", choices=PASSES, default=PASSES[0])
    parser.add_argument("--candidates", type=int, default=0, help="new rows to try in each cell")
    parser.add_argument("--top", type=int, default=3, help="rows shown for each head dim and mask")
    return parser.parse_args(arguments)


def gains(runs: Iterable[Any]) -> dict[tuple[int, str], dict[str, float]]:
    """For each head dim and mask the rows, fastest first by the geometric mean of their speeds
    relative to the automatic choice's. A row that was not timed in every cell is left out."""
    groups: dict[tuple[int, str], list[dict[str, float]]] = {}
    for run in runs:
        sizes = run.kind["sizes"]
        of_automatic = run.seconds[run.automatic]
        speeds = {name: of_automatic / seconds for name, seconds in run.seconds.items()}
        group = sizes["head_dim"], "causal" if sizes["causal"] else "full"
        groups.setdefault(group, []).append(speeds)
    means = {
        group: {
            name: report.geometric_mean([speeds[name] for speeds in members])
            for name in members[0]
            if all(name in speeds for speeds in members)
        }
        for group, members in groups.items()
    }
    return {
        group: dict(sorted(rows.items(), key=lambda item: -item[1]))
        for group, rows in means.items()
    }


def run(arguments: argparse.Namespace) -> list[Any]:
    from cute_kernels import tune

    name = f"search_{arguments.of_pass}_{arguments.dtype}.json"
    record = session.Record("search", arguments.out / name, arguments)
    record.data["runs"] = []
    runs = []
    grid = paper_grid(arguments.dtype, arguments.head_dims, arguments.masks, arguments.seqlens)
    for number, cell in enumerate(grid, start=1):
        found = tune(
            *draw(cell),
            of_pass=arguments.of_pass,
            causal=cell.causal,
            candidates=arguments.candidates,
            keep=False,
        )
        runs.append(found)
        record.data["runs"].append(dataclasses.asdict(found))
        record.save()
        session.say(f"[{number}/{len(grid)}] {cell}\n{found.table()}")
    session.say(f"wrote {record.path}")
    return runs


def main() -> int:
    arguments = parse()
    session.require_gpu()
    runs = run(arguments)
    for (head_dim, mask), rows in gains(runs).items():
        for name, gain in list(rows.items())[: arguments.top]:
            print(f"D={head_dim} {mask} {gain:.3f} {name}")
    return 1 if any(run.failed for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
