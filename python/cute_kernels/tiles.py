"""The rows that there are kernels for: the build's, and those that were added."""

from __future__ import annotations

import json
from typing import Any

from cute_kernels.extension import FOLDER

_BUILT: list[dict[str, Any]] = json.loads((FOLDER / "tile_configs.json").read_text("utf-8"))
_PASSES = ("forward", "backward", "forward_fp8", "decode", "decode_fp8", "prefill", "latent")
# By pass and name, in the order of the kernel tables in C++. Only `add_row` changes it.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    of_pass: {row["name"]: row for row in _BUILT if row["pass"] == of_pass} for of_pass in _PASSES
}


def tile_configs(of_pass: str | None = None) -> list[dict[str, Any]]:
    """The kernels of this build in the order of the table, and behind each pass's those that were
    added by `add_tile_config` and `load_tile_configs`.

    Args:
        of_pass: only those of this pass, "forward", "backward", "forward_fp8", "decode",
            "prefill", "latent" or "decode_fp8", whose ``"dtype"`` is "fp8": caches of 8 bits.

    Returns:
        One dict per kernel, a copy. ``"pass"`` is what it is for, ``"name"`` is unique:
        ``flash_attn_func(..., tile_config=)`` takes that of a forward row. Further keys:
        ``"dtype"`` ("bf16" or "fp16"), ``"head_dim"`` and
        ``"head_dim_v"`` (elements, the largest that the kernel takes), ``"mask"`` ("any", "full"
        or "causal": the calls that the automatic choice may give it; "none": those it was measured
        to be the fastest for), ``"tile_m"`` (queries) and ``"tile_n"`` (keys of a block),
        ``"stages"`` (blocks in shared memory that the kernel walks over: K and V forward, Q and dO
        backward), ``"consumer_warpgroups"``, ``"why"`` the row is there, and the pass's own
        columns, which the head of the table explains (cute_kernels/attention/tile_configs.toml).
        Kernels of a `Variant` have ``"variant"``, its name and a hash, and ``"gradients"``, the
        captured tensors that they compute gradients of.
    """
    return [
        dict(row)
        for name, rows in ROWS.items()
        if of_pass in (None, name)
        for row in list(rows.values())
    ]


def add_row(row: dict[str, Any]) -> None:
    """Lists a kernel that the extension has been given."""
    ROWS[row["pass"]][row["name"]] = row


def get_include() -> str:
    """The folder to compile against: its subfolder ``cute_kernels`` holds the C++ headers."""
    return str(FOLDER / "include")
