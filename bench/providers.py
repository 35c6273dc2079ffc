"""The implementations that are compared: ours and the peers, behind one small interface."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bench.cells import Cell
from bench.timing import Call

OURS = "ours"


@dataclass
class Provider:
    """One implementation.

    `bind` makes a call without arguments from q, k, v of shape (batch, seqlen, heads, head_dim);
    `output` takes the output, in that shape, from what the call returns. `context` surrounds calls
    and is entered outside what is timed.
    """

    name: str
    label: str
    version: str
    bind: Callable[[Cell, torch.Tensor, torch.Tensor, torch.Tensor], Call]
    output: Callable[[object], torch.Tensor] = lambda result: result
    context: Callable[[], AbstractContextManager] = nullcontext
    takes: Callable[[Cell], bool] = lambda cell: True


class Unavailable(Exception):
    """A peer that cannot run here, and why."""


def _first(result: object) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _import(module: str):
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer built for another torch fails in many ways
        raise Unavailable(
            f"{module} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def ours(tile_config: str | None = None, name: str = OURS) -> Provider:
    """cute_kernels with the tile it chooses, or with a named row of its table."""
    package = _import("cute_kernels")
    if not hasattr(package, "flash_attn_func"):
        raise Unavailable("cute_kernels is not installed (only its source folder was found)")

    def bind(cell, q, k, v):
        function, causal = package.flash_attn_func, cell.causal
        if tile_config is None:
            return lambda: function(q, k, v, causal=causal)
        return lambda: function(q, k, v, causal=causal, tile_config=tile_config)

    row = None if tile_config is None else tile_row(tile_config)
    return Provider(
        name=name,
        label="cute_kernels" if tile_config is None else tile_config,
        version=f"cute_kernels {package.__version__}",
        bind=bind,
        output=_first,
        takes=lambda cell: row is None or row_takes(row, cell),
    )


def tile_rows() -> list[dict]:
    """The forward rows of the installed build's table."""
    return _import("cute_kernels").tile_configs("forward")


def tile_row(name: str) -> dict:
    for row in tile_rows():
        if row["name"] == name:
            return row
    raise Unavailable(f"this build has no tile config {name!r}; see cute_kernels.tile_configs()")


def row_takes(row: dict, cell: Cell) -> bool:
    return (
        row["dtype"] == cell.dtype
        and row["head_dim"] == cell.head_dim
        and row["mask"] in ("any", cell.mask)
    )


def _sdpa(name: str, label: str, backend_name: str) -> Provider:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, backend_name)
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if "CUDNN" in backend_name else ""

    def bind(cell, q, k, v):
        function, causal = torch.nn.functional.scaled_dot_product_attention, cell.causal
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = cell.heads_kv != cell.heads
        return lambda: function(q, k, v, is_causal=causal, enable_gqa=grouped)

    return Provider(
        name=name,
        label=label,
        version=f"torch {torch.__version__}{cudnn}",
        bind=bind,
        output=lambda result: result.transpose(1, 2),
        context=lambda: sdpa_kernel(backend),
        # is_causal aligns the mask to the first key, not to the last
        takes=lambda cell: not cell.causal or cell.seqlen == cell.seqlen_k,
    )


def _flash_attn_like(
    name: str, label: str, module_name: str, *distributions: str, seqlens: Iterable[int] = ()
) -> Provider:
    module = _import(module_name)
    only = frozenset(seqlens)

    def bind(cell, q, k, v):
        function, causal = module.flash_attn_func, cell.causal
        return lambda: function(q, k, v, causal=causal)

    return Provider(
        name=name,
        label=label,
        version=_version(*distributions),
        bind=bind,
        output=_first,
        takes=lambda cell: not only or cell.seqlen in only,
    )


# Name on the command line -> how to load it; a loader raises Unavailable where it cannot run.
PEERS: dict[str, Callable[..., Provider]] = {
    "sdpa-cudnn": lambda **_: _sdpa("sdpa-cudnn", "SDPA cuDNN", "CUDNN_ATTENTION"),
    "sdpa-flash": lambda **_: _sdpa("sdpa-flash", "SDPA flash", "FLASH_ATTENTION"),
    "fa3-fwd": lambda **_: _flash_attn_like(
        "fa3-fwd", "FA3 (fa3-fwd)", "fa3_fwd_interface", "fa3-fwd"
    ),
    "fa3": lambda **_: _flash_attn_like(
        "fa3", "FA3 (source)", "flash_attn_interface", "flash-attn-3", "flash_attn_3"
    ),
    "fa4": lambda fa4_seqlens=(), **_: _flash_attn_like(
        "fa4", "FA4 (CuTe DSL)", "flash_attn.cute", "flash-attn-4", seqlens=fa4_seqlens
    ),
}


def load_peers(
    names: Iterable[str], fa4_seqlens: Iterable[int] = ()
) -> tuple[list[Provider], dict[str, str]]:
    """The peers that can run here, and why each of the others cannot."""
    loaded: list[Provider] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            loaded.append(PEERS[name](fa4_seqlens=tuple(fa4_seqlens)))
        except Unavailable as error:
            missing[name] = str(error)
    return loaded, missing
