"""What a call of the operator may look like, for the CPU and for shape inference.

The CUDA implementation checks the same in C++. Errors name the argument, what was given and what
is allowed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cute_kernels.tiles import AUTOMATIC, tile_configs

MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8

_GPU_DTYPES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (*_GPU_DTYPES, torch.float32, torch.float64)
_TILES = len(tile_configs())


def check_forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, tile_config: int) -> None:
    """Raises ValueError or TypeError unless the operator can answer this call."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has {tensor.dim()} dimensions; it must have 4: "
                "(batch, seqlen, heads, head_dim)"
            )
    allowed = _GPU_DTYPES if q.device.type == "cuda" else _CPU_DTYPES
    if q.dtype not in allowed:
        raise TypeError(
            f"q has dtype {q.dtype}; on {q.device.type} it must be one of "
            f"{', '.join(str(dtype) for dtype in allowed)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(
                f"{name} is on {tensor.device}, q on {q.device}; they must be on the same device"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be that of q, {q.dtype}")
    _check_shapes(q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(3) != 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(3)} in its last dimension; it must be 1 "
                "(call .contiguous())"
            )
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {softmax_scale}; it must be finite and greater than 0")
    if tile_config != AUTOMATIC and not 0 <= tile_config < _TILES:
        raise ValueError(
            f"tile_config is {tile_config}; this build has the rows 0 to {_TILES - 1} "
            f"(cute_kernels.tile_configs()), and {AUTOMATIC} is the automatic choice"
        )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    batch, _, heads, head_dim = q.shape
    if head_dim % HEAD_DIM_MULTIPLE != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"q has head_dim {head_dim}; it must be a multiple of {HEAD_DIM_MULTIPLE} "
            f"from {HEAD_DIM_MULTIPLE} to {MAX_HEAD_DIM}"
        )
    if k.shape[0] != batch:
        raise ValueError(f"k has batch size {k.shape[0]}; it must be that of q, {batch}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k has head_dim {k.shape[3]}; it must be that of q, {head_dim}")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be that of k, {tuple(k.shape)}")
    key_heads = k.shape[2]
    if heads != 0 and (key_heads == 0 or heads % key_heads != 0):
        raise ValueError(
            f"q has {heads} heads; their number must be a multiple of the {key_heads} heads of k"
        )
