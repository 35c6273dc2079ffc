"""The rows of the tile table that this build has kernels for."""

from __future__ import annotations

import json
from typing import Any

from cute_kernels.extension import FOLDER

_ROWS: list[dict[str, Any]] = json.loads((FOLDER / "tile_configs.json").read_text("utf-8"))


def tile_configs(of_pass: str | None = None) -> list[dict[str, Any]]:
    """The kernels of this build, in the order of the table.

    Args:
        of_pass: only those of this pass, "forward" or "backward".

    Returns:
        One dict per kernel, a copy. ``"pass"`` is what it is for, ``"name"`` is unique:
        ``flash_attn_func(..., tile_config=)`` takes that of a forward row. Further keys:
        ``"dtype"`` ("bf16" or "fp16"), ``"head_dim"`` and
        ``"head_dim_v"`` (elements, the largest that the kernel takes), ``"mask"`` ("any", "full"
        or "causal": the calls that the automatic choice may give it), ``"tile_m"`` (queries) and
        ``"tile_n"`` (keys of a block), ``"stages"`` (blocks in shared memory that the kernel walks
        over: K and V forward, Q and dO backward), ``"consumer_warpgroups"``, ``"why"`` the row is
        there, and the pass's own columns, which the head of the table explains
        (cute_kernels/attention/tile_configs.toml).
    """
    return [dict(row) for row in _ROWS if of_pass in (None, row["pass"])]


def get_include() -> str:
    """The folder to compile against: its subfolder ``cute_kernels`` holds the C++ headers."""
    return str(FOLDER / "include")
