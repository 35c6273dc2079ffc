"""The rows that a search tries: a space of columns, less what cannot become a kernel."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from .passes import PASSES
from .rows import Row
from .table import complete, kernel_row, problems

SPACE: dict[str, tuple[Any, ...]] = {
    "tile_m": (64, 128, 192, 256),
    "tile_n": tuple(range(48, 257, 16)),
    "separate_output": (True, False),
    "pingpong": (True, False),
    "stages": (3, 2, 4),
}
# The estimate never takes such a row: it is for the calls that it was measured with.
SPEED = 1e-6


class SearchSpace(NamedTuple):
    """Forward rows, the most promising first, and how many others were refused for what."""

    rows: list[Row]
    refused: Counter[str]


def search_space(dtype: str, head_dim: int, there: Iterable[Row] = ()) -> SearchSpace:
    """The rows of SPACE that fit, without those that are `there` already.

    First comes one of each tile, those first that read the fewest bytes of shared memory for a
    product; then a second one of each, and so on.
    """
    pass_ = PASSES["forward"]
    columns = [
        field.name
        for field in pass_.fields
        if field.constant or field.name in ("tile_m", *SPACE)  # what the kernel is made of
    ]
    known = {tuple(row[name] for name in columns) for row in there if row["dtype"] == dtype}
    of_tile: dict[tuple[int, int], list[Row]] = {}
    refused: Counter[str] = Counter()
    for values in itertools.product(*SPACE.values()):
        given = dict(zip(SPACE, values, strict=True))
        name = f"tuned_d{head_dim}_m{given['tile_m']}n{given['tile_n']}s{given['stages']}"
        name += ("_turns" if given["pingpong"] else "") + ("_o" if given["separate_output"] else "")
        head = {"name": name, "dtypes": [dtype], "head_dim": head_dim, "why": "of a search"}
        row = complete({**head, **given, "speed": SPEED}, name, pass_)
        if found := problems(row, pass_):
            refused.update(problem.partition(":")[0] for problem in found)
        elif tuple(row[name] for name in columns) not in known:
            tile = given["tile_m"], given["tile_n"]
            of_tile.setdefault(tile, []).append(kernel_row(row, dtype, pass_))
    tiles = sorted(of_tile, key=lambda tile: 1 / tile[0] + 1 / tile[1])
    turns = itertools.zip_longest(*(of_tile[tile] for tile in tiles))
    return SearchSpace([row for turn in turns for row in turn if row is not None], refused)
