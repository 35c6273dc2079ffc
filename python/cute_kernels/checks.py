"""What a call of the operator may look like, for the CPU and for shape inference.

The CUDA implementation checks the same, in the same words, in C++
(cute_kernels/torch/flash_attn_forward.cpp).
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
    _check_alone("q", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, must be on {q.device} like q")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, must be {q.dtype} like q")
        _check_alone(name, tensor)
    _check_shapes(q, k, v)
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {softmax_scale}, must be finite and greater than 0")
    if tile_config != AUTOMATIC and not 0 <= tile_config < _TILES:
        raise ValueError(
            f"tile_config is {tile_config}, must be {AUTOMATIC} (automatic) or an index "
            f"below {_TILES}"
        )


def _check_alone(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, must have 4 dimensions: "
            "(batch, seqlen, heads, head_dim)"
        )
    device = tensor.device.type
    allowed = _GPU_DTYPES if device == "cuda" else _CPU_DTYPES
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} has dtype {tensor.dtype}, must be {names} on {device}")
    if tensor.stride(3) != 1 and tensor.shape[3] != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}, its last dimension (head_dim) must be "
            "contiguous (stride 1)"
        )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    batch, _, heads, head_dim = q.shape
    if head_dim % HEAD_DIM_MULTIPLE != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"q has head_dim {head_dim}, must be a multiple of {HEAD_DIM_MULTIPLE} "
            f"from {HEAD_DIM_MULTIPLE} to {MAX_HEAD_DIM}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch:
            raise ValueError(f"{name} has batch {tensor.shape[0]}, must be {batch} like q")
        if tensor.shape[3] != head_dim:
            raise ValueError(f"{name} has head_dim {tensor.shape[3]}, must be {head_dim} like q")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v has seqlen {v.shape[1]}, must be {k.shape[1]} like k")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads, must have {k.shape[2]} like k")
    if heads != 0 and (k.shape[2] == 0 or heads % k.shape[2] != 0):
        raise ValueError(f"q has {heads} heads, must be a multiple of k's {k.shape[2]}")
