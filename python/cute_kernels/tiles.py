"""The rows of the tile table that this build has kernels for."""

from __future__ import annotations

import json
from typing import Any

from cute_kernels.extension import FOLDER

AUTOMATIC = -1  # the operator's tile_config for "choose by estimated time"

_ROWS: list[dict[str, Any]] = json.loads((FOLDER / "tile_configs.json").read_text("utf-8"))
_INDEX = {row["name"]: index for index, row in enumerate(_ROWS)}


def tile_configs() -> list[dict[str, Any]]:
    """The kernels of this build, in the order of the table.

    Returns:
        One dict per kernel, a copy. Its place in the list is its index, its ``"name"`` is unique;
        ``flash_attn_func(..., tile_config=)`` takes either. Further keys: ``"pass"`` ("forward"),
        ``"dtype"`` ("bf16" or "fp16"), ``"head_dim"`` and ``"head_dim_v"`` (elements, the largest
        that the kernel takes), ``"mask"`` ("any", "full" or "causal": the calls that the automatic
        choice may give it), ``"tile_m"`` (queries) and ``"tile_n"`` (keys of a block), ``"stages"``
        (K and V blocks in shared memory), ``"consumer_warpgroups"``, the switches ``"pingpong"``,
        ``"overlap"`` and ``"separate_output"``, what the automatic choice estimates by (``"speed"``
        relative to the head dim's other rows, ``"overhead"`` of a tile in keys), and ``"why"`` the
        row is there.
    """
    return [dict(row) for row in _ROWS]


def tile_index(tile_config: str | int) -> int:
    """The index of a row given by name or index; the operator checks the range of an index."""
    if isinstance(tile_config, int):
        return tile_config
    try:
        return _INDEX[tile_config]
    except KeyError:
        raise ValueError(
            f"tile_config {tile_config!r} is not a row of this build; there are: "
            f"{', '.join(_INDEX) or 'none'}"
        ) from None


def get_include() -> str:
    """The folder to compile against: its subfolder ``cute_kernels`` holds the C++ headers."""
    return str(FOLDER / "include")
