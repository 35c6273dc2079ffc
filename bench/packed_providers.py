"""Who computes attention inside packed sequences: ours, FlashAttention-3 of two libraries,
FlashAttention-4, and PyTorch's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import fa3_library, vllm_library
from bench.packed_cells import PackedCell
from bench.packed_inputs import sinks_of, starts
from bench.providers import (
    OURS,
    Provider,
    Unavailable,
    fa3_of_a_library,
    fa4_module,
    fa4_options,
    library_of,
)

DENSE = f"{OURS}:dense"
DETERMINISTIC = f"{OURS}:deterministic"
XFORMERS = "fa3-xformers"
VLLM = "fa3-vllm"
FA4 = "fa4"
VARLEN = "varlen-attn"


def ours(name: str = OURS, deterministic: bool = False) -> Provider:
    import cute_kernels

    def function(cell: PackedCell):
        options = _options(cell)
        if deterministic:
            options["deterministic"] = True

        def call(q, k, v):
            at = starts(cell.lengths, q.device)
            sinks = _sinks(cell, q, torch.float32)
            longest = (cell.seqlen, cell.seqlen)
            return cute_kernels.flash_attn_varlen_func(
                q, k, v, at, at, *longest, sinks=sinks, **options
            )

        return call

    label = "cute_kernels, deterministic" if deterministic else "cute_kernels"
    return Provider(name, label, f"cute_kernels {cute_kernels.__version__}", function)


def dense() -> Provider:
    """Our kernels for sequences that are known to have one length."""
    import cute_kernels

    def function(cell: PackedCell):
        options = _options(cell)

        def call(q, k, v):
            q, k, v = (x.unflatten(0, (cell.batch, cell.seqlen)) for x in (q, k, v))
            sinks = _sinks(cell, q, torch.float32)
            out = cute_kernels.flash_attn_func(q, k, v, sinks=sinks, **options)
            return out.flatten(0, 1)

        return call

    version = f"cute_kernels {cute_kernels.__version__}"
    return Provider(DENSE, "cute_kernels, dense", version, function, takes=lambda cell: cell.equal)


def _options(cell: PackedCell) -> dict[str, Any]:
    return {"causal": True, "window_size": cell.window_size}


def _sinks(cell: PackedCell, q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    return sinks_of(cell.heads, q.device, dtype) if cell.sinks else None


def _fa3_options(cell: PackedCell, device: torch.device) -> dict[str, Any]:
    """By the names of FlashAttention-3's operators."""
    at = starts(cell.lengths, device)
    left, right = cell.window_size
    return {
        "cu_seqlens_q": at,
        "cu_seqlens_k": at,
        "max_seqlen_q": cell.seqlen,
        "max_seqlen_k": cell.seqlen,
        "is_causal": True,
        "window_size_left": left,
        "window_size_right": right,
    }


def xformers(path: Path | None, deterministic: bool = False) -> Provider:
    operators, version = fa3_of_a_library(path)
    attention = fa3_library.attention(operators, deterministic=deterministic)

    def takes(cell: PackedCell) -> bool:
        ordered = not deterministic or cell.head_dim <= 192  # of 256 it has no such gradient
        return ordered and not cell.sinks

    return Provider(
        f"{XFORMERS}:deterministic" if deterministic else XFORMERS,
        "FA3 (xformers), deterministic" if deterministic else "FA3 (xformers)",
        version,
        lambda cell: lambda q, k, v: attention(q, k, v, _fa3_options(cell, q.device)),
        takes=takes,
    )


def vllm(path: Path | None) -> Provider:
    operators, name = library_of(
        path, vllm_library.VARIABLE, vllm_library.HOW_TO_GET, vllm_library.load_attention
    )

    def function(cell: PackedCell):
        def call(q, k, v):
            options = _fa3_options(cell, q.device)
            sinks = _sinks(cell, q, q.dtype)
            return vllm_library.attention(operators, q, k, v, s_aux=sinks, **options)

        return call

    return Provider(VLLM, "FA3 (vLLM)", f"_vllm_fa3_C of {name}", function)


def fa4() -> Provider:
    module, version = fa4_module()

    def function(cell: PackedCell):
        options = fa4_options(causal=True, window_size=cell.window_size)

        def call(q, k, v):
            at = starts(cell.lengths, q.device)
            sinks = _sinks(cell, q, torch.bfloat16)
            lengths = {"cu_seqlens_q": at, "cu_seqlens_k": at}
            longest = {"max_seqlen_q": cell.seqlen, "max_seqlen_k": cell.seqlen}
            return module.flash_attn_varlen_func(
                q, k, v, **lengths, **longest, learnable_sink=sinks, **options
            )

        return call

    return Provider(FA4, "FA4 (CuTe DSL)", version, function)


def varlen_attn() -> Provider:
    """PyTorch's, which is FlashAttention-2."""
    if not torch.cuda.is_available():
        raise Unavailable("varlen_attn needs a GPU")
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn: {error}") from error

    def function(cell: PackedCell):
        options: dict[str, Any] = {"window_size": (cell.window, 0)}
        if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
            options["enable_gqa"] = cell.heads != cell.heads_kv

        def call(q, k, v):
            at = starts(cell.lengths, q.device)
            return varlen.varlen_attn(q, k, v, at, at, cell.seqlen, cell.seqlen, **options)

        return call

    def takes(cell: PackedCell) -> bool:
        return not cell.sinks and cell.head_dim == cell.head_dim_v

    return Provider(VARLEN, "varlen_attn", f"torch {torch.__version__}", function, takes=takes)


def load(
    backward: bool, fa3: Path | None, vllm_path: Path | None
) -> tuple[list[Provider], dict[str, str]]:
    """Ours and the peers that can run here, and why others cannot."""
    loaded = [ours(), dense()]
    loaders: Iterable[tuple[str, Any]] = [
        (XFORMERS, lambda: xformers(fa3)),
        (FA4, fa4),
        (VARLEN, varlen_attn),
    ]
    if backward:
        loaded.append(ours(DETERMINISTIC, deterministic=True))
        loaders = [
            *loaders,
            (f"{XFORMERS}:deterministic", lambda: xformers(fa3, deterministic=True)),
        ]
    else:
        loaders = [(VLLM, lambda: vllm(vllm_path)), *loaders]
    missing = {}
    for name, loader in loaders:
        try:
            loaded.append(loader())
        except Unavailable as error:
            missing[name] = str(error)
    return loaded, missing
