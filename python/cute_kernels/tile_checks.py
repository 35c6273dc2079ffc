"""Whether a kernel takes a call: the one that it names, a row of the tile table, and any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_kernels.tiles import ROWS

_DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "int8",
}
_BLOCK = 64  # rows of the smallest tile
_BLOCKS_LIMIT = 2**30


def check_tile_config(
    tile_config: str | None,
    of_pass: str,
    q: Tensor,
    v: Tensor,
    any_call: bool = False,
    softcap: bool = False,
) -> None:
    """`any_call`, `softcap`: what a call needs a row with these columns for."""
    if tile_config is None:
        return
    rows = ROWS[of_pass]
    if not isinstance(tile_config, str):
        error: type[Exception] = TypeError
    elif tile_config not in rows:
        error = ValueError
    else:
        if q.device.type == "cuda":
            _check_row(rows[tile_config], q, v, any_call, softcap)
        return
    raise error(
        f"tile_config is {tile_config!r}, must be None (automatic) or the name of a {of_pass} row "
        f"of this build: {', '.join(rows) or 'there is none'}"
    )


def is_own_mask(
    q: Tensor, k: Tensor, left: int | None, right: int | None, diagonal: int | None
) -> bool:
    """Whether it is neither none nor the causal one, as kernel_ranges has it
    (attention/ranges.hpp)."""
    bottom_right = k.shape[1] - q.shape[1]
    at = bottom_right if diagonal is None else diagonal
    if left is not None and q.shape[1] - 1 + at > left:
        return True
    return right is not None and at + right < k.shape[1] - 1 and at + right != bottom_right


def _check_row(row: dict[str, Any], q: Tensor, v: Tensor, any_call: bool, softcap: bool) -> None:
    name, dtype = row["name"], _DTYPE_NAMES.get(q.dtype)
    head_dim_v = row.get("head_dim_v", row["head_dim"])
    if row["dtype"] != dtype or row["head_dim"] < q.shape[-1]:
        raise ValueError(
            f"tile_config {name!r} takes {row['dtype']} with head_dim up to {row['head_dim']}, but "
            f"q is {dtype} with head_dim {q.shape[-1]}"
        )
    if head_dim_v < v.shape[-1]:
        raise ValueError(
            f"tile_config {name!r} takes v with head_dim up to {head_dim_v}, but v has "
            f"{v.shape[-1]}"
        )
    if "variant" in row:
        raise ValueError(f"tile_config {name!r} takes calls with its variant only")
    if softcap != row.get("softcap", False):
        takes = "takes no softcap" if softcap else "takes calls with a softcap only"
        raise ValueError(f"tile_config {name!r} {takes}")
    if any_call and not (row.get("any_call", False) or row.get("grouped")):
        raise ValueError(
            f"tile_config {name!r} takes no window, no diagonal, no sinks and no packed sequences, "
            "must be a row with any_call"
        )


def check_blocks(name: str, x: Tensor) -> None:
    """The grid's limit, far from what fits into memory; compilers' symbols are not asked."""
    batch, seqlen, heads, _ = x.shape
    blocks = batch * heads * ((seqlen + _BLOCK - 1) // _BLOCK)
    if x.device.type == "cuda" and isinstance(blocks, int) and blocks >= _BLOCKS_LIMIT:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, batch * heads * blocks of {_BLOCK} rows must be "
            "below 2^30"
        )
