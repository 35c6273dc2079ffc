"""What the kernels cannot answer, asked before a call."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from cute_kernels.tiles import tile_configs

_DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16),
}


def attends_to_caches(query: Tensor) -> bool:
    """Whether `flash_attn_with_kvcache`, which cuts the keys of few queries into parts, can answer
    calls without a gradient."""
    return query.device.type != "cuda" or bool(tile_configs("decode"))


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_known_mask: bool,
    position_bias: Tensor | None,
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
