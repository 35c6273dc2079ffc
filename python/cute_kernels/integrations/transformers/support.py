"""What the kernels cannot answer, asked before a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

import cute_kernels
from cute_kernels.arguments import is_later
from cute_kernels.checks import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from cute_kernels.interface import flash_attn_func
from cute_kernels.tiles import tile_configs
from cute_kernels.varlen import flash_attn_varlen_func


def _takes(name: str) -> bool:
    """Whether the functions have this argument and what it asks for."""
    functions = (flash_attn_func, flash_attn_varlen_func)
    return not is_later(name) and all(name in inspect.signature(f).parameters for f in functions)


_SOFTCAP = _takes("softcap")
_SINKS = _takes("sinks")
_CHUNKS = _takes("attention_chunk")
_DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16),
}


def attention_to_caches(query: Tensor) -> Callable[..., Tensor] | None:
    """`flash_attn_with_kvcache`, which cuts the keys of few queries into parts, where it can answer
    calls without a gradient."""
    function: Callable[..., Tensor] | None
    function = getattr(cute_kernels, "flash_attn_with_kvcache", None)
    return function if query.device.type != "cuda" or tile_configs("decode") else None


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_known_mask: bool,
    position_bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    chunk: int | None,
) -> str | None:
    """Why the kernels cannot answer a layer's call; None if they can.

    Args:
        query, key, value: (batch, heads, seqlen, head_dim).
        is_known_mask: whether lengths and a window say what queries see.
    """
    device, dtype = query.device.type, query.dtype
    if not is_known_mask:
        return "the mask is not one of padding, packed sequences, causal or a window"
    if position_bias is not None:
        return "there is no position_bias"
    if softcap is not None and not _SOFTCAP:
        return "there is no softcap yet"
    if sinks is not None and not _SINKS:
        return "there are no sinks yet"
    if chunk is not None and not _CHUNKS:
        return "there is no attention_chunk yet"
    if dtype not in _DTYPES.get(device, ()):
        return f"there is no {str(dtype).removeprefix('torch.')} on {device}"
    if device == "cuda" and torch.cuda.get_device_capability(query.device) != (9, 0):
        return f"{torch.cuda.get_device_name(query.device)} is no GPU of compute capability 9.0"
    for size in (query.shape[-1], value.shape[-1]):
        if size % HEAD_DIM_MULTIPLE != 0 or not 0 < size <= MAX_HEAD_DIM:
            return f"there is no head_dim {size}"
    if query.shape[1] % key.shape[1] != 0:
        return f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads"
    return None
