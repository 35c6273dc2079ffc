"""The implementations that are compared: ours and the peers, behind one small interface."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import fa3_library
from bench.cells import Cell
from bench.timing import Call

OURS = "ours"


def _first(result: object) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


@dataclass
class Provider:
    """One implementation of the forward pass.

    `function` gives for a cell what is called with q, k and v. `arrange` makes a view of a (batch,
    seqlen, heads, head_dim) tensor as the function wants it, and is its own inverse. `context`
    surrounds calls and is entered outside what is timed. `parameters` of the function have
    gradients beside those of q, k and v.
    """

    name: str
    label: str
    version: str
    function: Callable[[Cell], Callable[..., object]]
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    context: Callable[[], AbstractContextManager] = nullcontext
    takes: Callable[[Cell], bool] = lambda cell: True
    parameters: tuple[torch.Tensor, ...] = ()

    def bind(self, cell: Cell, *inputs: torch.Tensor) -> Call:
        """A call without arguments, from q, k and v of shape (batch, seqlen, heads, head_dim)."""
        function = self.function(cell)
        q, k, v = map(self.arrange, inputs)
        return lambda: function(q, k, v)

    def output(self, result: object) -> torch.Tensor:
        """The output in that shape, from what the call returns."""
        return self.arrange(_first(result))

    def _leaves(self, inputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [self.arrange(x).detach().requires_grad_() for x in inputs]


class Backward(Provider):
    """The backward pass of a provider's forward, by autograd; the forward is not timed."""

    def bind(self, cell: Cell, *inputs: torch.Tensor) -> Call:
        *qkv, grad_out = inputs
        leaves, grad = self._leaves(qkv), self.arrange(grad_out)
        # Autograd runs a gradient on the stream of its forward, and the default stream cannot be
        # captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.enable_grad(), self.context(), torch.cuda.stream(stream):
            out = _first(self.function(cell)(*leaves))
        torch.cuda.current_stream().wait_stream(stream)
        wanted = (*leaves, *self.parameters)
        return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)

    def output(self, result: object) -> tuple[torch.Tensor, ...]:
        return tuple(map(self.arrange, result[:3]))


class TrainingStep(Provider):
    """Forward and backward by autograd."""

    def bind(self, cell: Cell, *inputs: torch.Tensor) -> Call:
        *qkv, grad_out = inputs
        leaves, grad = self._leaves(qkv), self.arrange(grad_out)
        function = self.function(cell)
        wanted = (*leaves, *self.parameters)
        return lambda: torch.autograd.grad(_first(function(*leaves)), wanted, grad)

    def output(self, result: object) -> tuple[torch.Tensor, ...]:
        return tuple(map(self.arrange, result[:3]))


def backward_of(provider: Provider) -> Backward:
    return Backward(**vars(provider))


def training_step_of(provider: Provider) -> TrainingStep:
    @contextmanager
    def context():
        with ExitStack() as stack:
            stack.enter_context(provider.context())
            stack.enter_context(torch.enable_grad())
            yield

    return TrainingStep(**{**vars(provider), "context": context})


class Unavailable(Exception):
    """A peer that cannot run here, and why."""


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


def ours(tile_config: str | None = None, name: str = OURS, deterministic: bool = False) -> Provider:
    """cute_kernels with the tile it chooses, or with a named forward row of its table."""
    package = _import("cute_kernels")
    if not hasattr(package, "flash_attn_func"):
        raise Unavailable("cute_kernels is not installed (only its source folder was found)")

    options: dict[str, object] = {}
    label = "cute_kernels"
    if tile_config is not None:
        options, label = {"tile_config": tile_config}, tile_config
    if deterministic:
        options, label = {**options, "deterministic": True}, f"{label}, deterministic"
    row = None if tile_config is None else tile_row(tile_config)
    return Provider(
        name=name,
        label=label,
        version=f"cute_kernels {package.__version__}",
        function=lambda cell: partial(package.flash_attn_func, causal=cell.causal, **options),
        takes=lambda cell: row is None or row_takes(row, cell),
    )


def backward_row(tile_config: str, name: str) -> Backward:
    """Our backward operator with a named row of the table."""
    operator = _import("cute_kernels.operators").flash_attn_backward
    row = tile_row(tile_config, "backward")
    automatic = ours()

    class Row(Backward):
        def bind(self, cell: Cell, *inputs: torch.Tensor) -> Call:
            *qkv, grad_out = inputs
            out, lse = partial(self.function(cell), return_lse=True)(*qkv)
            options = (cell.head_dim**-0.5, cell.causal, False, tile_config)
            return lambda: operator(grad_out, None, *qkv, out, lse, *options)

    return Row(
        name=name,
        label=tile_config,
        version=automatic.version,
        function=automatic.function,
        takes=lambda cell: row_takes(row, cell),
    )


def tile_rows(of_pass: str = "forward") -> list[dict]:
    """The rows of the installed build's table."""
    return _import("cute_kernels").tile_configs(of_pass)


def tile_row(name: str, of_pass: str = "forward") -> dict:
    for row in tile_rows(of_pass):
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

    return Provider(
        name=name,
        label=label,
        version=f"torch {torch.__version__}{cudnn}",
        function=lambda cell: partial(
            torch.nn.functional.scaled_dot_product_attention,
            is_causal=cell.causal,
            enable_gqa=cell.heads_kv != cell.heads,
        ),
        arrange=lambda tensor: tensor.transpose(1, 2),
        context=lambda: sdpa_kernel(backend),
        # is_causal aligns the mask to the first key, not to the last
        takes=lambda cell: not cell.causal or cell.seqlen == cell.seqlen_k,
    )


def _flash_attn_like(
    name: str, label: str, module_name: str, *distributions: str, seqlens: Iterable[int] = ()
) -> Provider:
    module = _import(module_name)
    only = frozenset(seqlens)

    return Provider(
        name=name,
        label=label,
        version=_version(*distributions),
        function=lambda cell: partial(module.flash_attn_func, causal=cell.causal),
        takes=lambda cell: not only or cell.seqlen in only,
    )


def fa4_module() -> tuple[Any, str]:
    """FlashAttention-4, and the version to record."""
    return _import("flash_attn.cute"), _version("flash-attn-4")


def fa4_options(causal: bool, window_size: tuple[int, int], **more: Any) -> dict[str, Any]:
    """Of its functions, which say None where others say -1."""
    left, right = (None if x < 0 else x for x in window_size)
    return {"causal": causal, "window_size": (left, right), **more}


def _fa3_from_source() -> Provider:
    module = "flash_attn_interface"
    if module not in sys.modules and fa3_library.registered():
        raise Unavailable(fa3_library.ONE_IN_A_PROCESS)
    return _flash_attn_like("fa3", "FA3 (source)", module, "flash-attn-3", "flash_attn_3")


def library_of(
    path: Path | None, variable: str, how_to_get: str, load: Callable[[Path], Any]
) -> tuple[Any, str]:
    """The operators of a library, which `path` or the environment's `variable` names, and the
    name of its file."""
    named = path or os.environ.get(variable)
    if not named:
        raise Unavailable(f"no library is given; {how_to_get}")
    library = Path(named)
    try:
        return load(library), library.name
    except OSError as error:
        reason = error.__cause__ or error  # PyTorch's own says only which file
        raise Unavailable(f"{reason}; {how_to_get}") from error
    except RuntimeError as error:
        raise Unavailable(str(error)) from error


def fa3_of_a_library(path: Path | None) -> tuple[Any, str]:
    """The operators of the FlashAttention-3 inside xformers, and the version to record."""
    operators, name = library_of(
        path, fa3_library.VARIABLE, fa3_library.HOW_TO_GET, fa3_library.load
    )
    return operators, f"flash_attn_3 of {name}"


def _fa3_xformers(path: Path | None) -> Provider:
    operators, version = fa3_of_a_library(path)
    function = fa3_library.attention(operators)

    return Provider(
        name="fa3-xformers",
        label="FA3 (xformers)",
        version=version,
        function=lambda cell: lambda q, k, v: function(q, k, v, {"is_causal": cell.causal}),
    )


# Name on the command line -> how to load it; a loader raises Unavailable where it cannot run.
PEERS: dict[str, Callable[..., Provider]] = {
    "sdpa-cudnn": lambda **_: _sdpa("sdpa-cudnn", "SDPA cuDNN", "CUDNN_ATTENTION"),
    "sdpa-flash": lambda **_: _sdpa("sdpa-flash", "SDPA flash", "FLASH_ATTENTION"),
    "fa3-fwd": lambda **_: _flash_attn_like(
        "fa3-fwd", "FA3 (fa3-fwd)", "fa3_fwd_interface", "fa3-fwd"
    ),
    "fa3": lambda **_: _fa3_from_source(),
    "fa3-xformers": lambda fa3_library=None, **_: _fa3_xformers(fa3_library),
    "fa4": lambda fa4_seqlens=(), **_: _flash_attn_like(
        "fa4", "FA4 (CuTe DSL)", "flash_attn.cute", "flash-attn-4", seqlens=fa4_seqlens
    ),
}


def load_peers(names: Iterable[str], **options: Any) -> tuple[list[Provider], dict[str, str]]:
    """The peers that can run here, and why each of the others cannot. Options: of the loaders."""
    loaded: list[Provider] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            loaded.append(PEERS[name](**options))
        except Unavailable as error:
            missing[name] = str(error)
    return loaded, missing
