"""The kernels of variants: rows of their own, compiled when a call first needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cute_kernels.compile.config import TileConfig
from cute_kernels.compile.hooks import KNOWN
from cute_kernels.plugins import compile_candidates, load_new
from cute_kernels.tiles import ROWS

_DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# The tiles of rows with a softcap, which leave registers for hooks.
_FORWARD: dict[int, dict[str, Any]] = {
    64: {"tile_m": 192, "tile_n": 64, "stages": 4},
    128: {"tile_m": 192, "tile_n": 64, "stages": 3},
    192: {"tile_m": 128, "tile_n": 96, "stages": 2},
    256: {"tile_m": 128, "tile_n": 64, "stages": 2},
}
# Of whole units of a block mask: of 128 queries, and a part of 128 keys.
_FORWARD_OF_BLOCKS: dict[int, dict[str, Any]] = {
    64: {"tile_m": 128, "tile_n": 128, "stages": 4},
    128: {"tile_m": 128, "tile_n": 128, "stages": 2},
    192: {"tile_m": 128, "tile_n": 64, "stages": 2},
    256: {"tile_m": 128, "tile_n": 64, "stages": 2},
}
_BACKWARD: dict[int, dict[str, Any]] = {
    64: {"tile_m": 64, "tile_n": 128, "key_blocks_in_registers": 2},
    128: {"tile_m": 64, "tile_n": 128, "key_blocks_in_registers": 2},
    256: {
        "tile_m": 64,
        "tile_n": 64,
        "key_blocks_in_registers": 4,
        "value_blocks_in_registers": 4,
        "split_products": True,
    },
}
# What leaves no registers for keys, and no second way from one warpgroup to the other
_LARGEST_WITH_MORE = 128
# Scores that read captured tensors for each query or key need registers for addresses. Masks read
# them where those of scores are free.
_BESIDE_READS = {128: {"key_blocks_in_registers": 1}}


class Names(NamedTuple):
    """The kernels of a call."""

    forward: str
    backward: str | None


def kernels_of(
    key: str,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    has_gradient: bool,
    gradients: Sequence[str] = (),
    tile_config: str | None = None,
) -> Names:
    """The names of a variant's kernels for calls on CUDA, compiled and loaded if they are not yet.

    Args:
        key: of the variant's hooks.
        dtype, head_dim, head_dim_v: of q and v.
        has_gradient: whether a backward kernel is needed, too.
        gradients: the captured tensors that have gradients.
        tile_config: a forward kernel of the variant, instead of the one for the head dims.

    Raises:
        RuntimeError: as `cute_kernels.add_tile_config`; with the compiler's message.
        NotImplementedError: there is no gradient for such a call, or `score` does not compile for
            dual numbers.
    """
    rows = rows_of(key, dtype, max(head_dim, head_dim_v), has_gradient, gradients)
    if tile_config is not None:
        del rows[0]
    load(rows)
    forward = rows[0]["name"] if tile_config is None else tile_config
    return Names(forward, rows[-1]["name"] if has_gradient else None)


def rows_of(
    key: str,
    dtype: torch.dtype,
    head_dim: int,
    has_gradient: bool,
    gradients: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The forward row of such calls, and the backward row. `head_dim` is the larger one of q and
    v. Raises NotImplementedError where there is no gradient."""
    rows = [_row("forward", key, dtype, head_dim)]
    if has_gradient:
        if head_dim > _LARGEST_WITH_MORE and (gradients or KNOWN[key].weight is not None):
            what = f"of {gradients[0]}" if gradients else "with weights"
            raise NotImplementedError(
                f"variant {KNOWN[key].name} has no gradient {what} for head dims above "
                f"{_LARGEST_WITH_MORE}, and it is {head_dim}"
            )
        rows.append(_row("backward", key, dtype, head_dim, tuple(gradients)))
    return rows


def load(rows: Sequence[dict[str, Any]]) -> None:
    """Compiles rows of variants in parallel, those that the cache does not have, and adds those
    that are not there yet."""
    rows = [row for row in rows if row["name"] not in ROWS[row["pass"]]]
    for row in rows:
        if not any("variant" not in other for other in ROWS[row["pass"]].values()):
            raise RuntimeError(f"this build has no {row['pass']} kernels, and can add none")
    if not rows:
        return
    libraries, failed = compile_candidates(rows)
    load_new(rows, libraries)
    for row in rows:
        if (error := failed.get(row["name"])) is None:
            continue
        compiles = any(other.get("variant") == row["variant"] for other in ROWS["forward"].values())
        if row["pass"] == "backward" and compiles:
            raise NotImplementedError(
                f"variant {KNOWN[row['variant']].name} has no gradient: its hooks compile, but "
                f"not for dual numbers; change score or give score_gradient. {error}"
            ) from error
        raise error


def _row(
    of_pass: str, key: str, dtype: torch.dtype, head_dim: int, gradients: tuple[str, ...] = ()
) -> dict[str, Any]:
    tiles = _BACKWARD
    if of_pass == "forward":
        tiles = _FORWARD_OF_BLOCKS if KNOWN[key].block_mask else _FORWARD
    fitting = min(size for size in tiles if size >= head_dim)
    columns, dtype_name = dict(tiles[fitting]), _DTYPE_NAMES[dtype]
    # Numbered: names may differ in case alone, or by what else is joined here.
    declared = [tensor.name for tensor in KNOWN[key].tensors]
    of = [f"of{declared.index(tensor)}_{tensor}" for tensor in gradients]
    name = "_".join([dtype_name, key, of_pass, f"d{fitting}", *of])
    if of_pass == "forward":
        columns |= {"separate_output": True, "sum_in_pairs": True}
    else:
        columns |= {"statistics_by_product": True}
        if gradients or KNOWN[key].weight is not None:
            columns["key_blocks_in_registers"] = 0
        elif KNOWN[key].score is not None and not all(
            tensor.is_of_rows for tensor in KNOWN[key].tensors
        ):
            columns |= _BESIDE_READS.get(fitting, {})
    config = TileConfig(
        of_pass,
        name=name.lower(),
        dtype=dtype_name,
        head_dim=fitting,
        any_call=True,
        why="of a user's variant",
        **columns,
    )
    return {**config.as_dict(), "variant": key, "gradients": gradients}
