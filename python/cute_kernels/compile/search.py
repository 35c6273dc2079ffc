"""The rows that a search tries: a space of columns, less what cannot become a kernel."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from .passes import PASSES
from .rows import Row
from .table import complete, kernel_row, problems

LONG_SUM_KEYS = 512  # FP8: as many as the tensor cores may add up (docs/fp8.md)
# By pass and column, the value to begin with first; the last column changes first.
SPACES: dict[str, dict[str, tuple[Any, ...]]] = {
    "forward": {
        "tile_m": (64, 128, 192, 256),
        "tile_n": tuple(range(48, 257, 16)),
        "separate_output": (True, False),
        "pingpong": (True, False),
        "stages": (3, 2, 4),
    },
    "backward": {
        "tile_m": (64, 128, 192),
        "tile_n": (128, 64),
        "split_products": (False, True),
        "stages": (2, 3),
        "statistics_by_product": (True, False),
        "scores_behind_dk": (False, True),
        "key_blocks_in_registers": (2, 4, 8, 0),
    },
    "forward_fp8": {
        "tile_m": (64, 128, 192, 256),
        "tile_n": (64, 128, 192, 256),
        "linear_exp": (True, False),
        "moves_of_four": (1, 0),
        "stages": (3, 2, 4),
        "overlap": (True, False),
        "pingpong": (True, False),
    },
}
# How a row's name says its columns: numbers by a letter, switches by a word if they are on.
_LETTERS = {
    "tile_m": "m",
    "tile_n": "n",
    "stages": "s",
    "key_blocks_in_registers": "k",
    "moves_of_four": "f",
}
_WORDS = {
    "separate_output": "o",
    "pingpong": "turns",
    "overlap": "overlap",
    "linear_exp": "linear",
    "split_products": "split",
    "statistics_by_product": "product",
    "scores_behind_dk": "behind",
}


class SearchSpace(NamedTuple):
    """Rows of a pass, the most promising first, and how many others were refused for what."""

    rows: list[Row]
    refused: Counter[str]


def search_space(of_pass: str, dtype: str, head_dim: int, there: Iterable[Row] = ()) -> SearchSpace:
    """The rows of a pass's space that fit, without those that are `there` already.

    First comes one of each tile, those first that read the fewest bytes of shared memory for a
    product; then a second one of each, and so on. Their mask is "none": the automatic choice takes
    them for what they were measured with, and nothing else.
    """
    pass_, space = PASSES[of_pass], dict(SPACES[of_pass])
    if dtype == "e4m3":  # moves are of int8's products alone
        space["moves_of_four"] = (0,)
    columns = [
        field.name
        for field in pass_.fields
        if field.constant or field.name in space  # what the kernel is made of
    ]
    known = {tuple(row[name] for name in columns) for row in there if row["dtype"] == dtype}
    of_tile: dict[tuple[int, int], list[Row]] = {}
    refused: Counter[str] = Counter()
    for values in itertools.product(*space.values()):
        given = dict(zip(space, values, strict=True))
        name = _name(of_pass, head_dim, given)
        head = {"name": name, "dtypes": [dtype], "head_dim": head_dim, "mask": "none"}
        if of_pass == "forward":
            given["sum_in_pairs"] = given["tile_n"] < 128  # as measured (docs/tuning.md)
        elif of_pass == "forward_fp8":  # sums are to be right however long (docs/fp8.md)
            given["promote_every"] = LONG_SUM_KEYS // given["tile_n"]
        elif of_pass == "backward" and given["split_products"]:
            given["value_blocks_in_registers"] = given["key_blocks_in_registers"]
        row = complete({**head, **given, "why": "of a search"}, name, pass_)
        if found := problems(row, pass_):
            refused.update(problem.partition(":")[0] for problem in found)
        elif tuple(row[name] for name in columns) not in known:
            tile = given["tile_m"], given["tile_n"]
            of_tile.setdefault(tile, []).append(kernel_row(row, dtype, pass_))
    tiles = sorted(of_tile, key=lambda tile: 1 / tile[0] + 1 / tile[1])
    turns = itertools.zip_longest(*(of_tile[tile] for tile in tiles))
    return SearchSpace([row for turn in turns for row in turn if row is not None], refused)


def _name(of_pass: str, head_dim: int, given: Row) -> str:
    kind = of_pass.removeprefix("forward").strip("_")
    numbers = "".join(f"{_LETTERS[key]}{given[key]}" for key in given if key in _LETTERS)
    switches = [_WORDS[key] for key in given if key in _WORDS and given[key]]
    return "_".join(filter(None, ["tuned", kind, f"d{head_dim}", numbers, *switches]))
