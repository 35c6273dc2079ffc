"""What a call of the operators may look like, for the CPU and for shape inference: the functions
take what the operators take.

The CUDA implementations check the same, in the same words, in C++ (cute_kernels/torch/call.cpp).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cute_kernels.reference import accumulator_dtype
from cute_kernels.tiles import AUTOMATIC, tile_configs

MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8

_GPU_DTYPES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (*_GPU_DTYPES, torch.float32, torch.float64)
_TILES = {name: len(tile_configs(name)) for name in ("forward", "backward")}


def check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    tile_config: int,
    deterministic: bool = False,
) -> None:
    """Raises ValueError or TypeError unless the forward operator can answer this call."""
    _check_call(q, k, v, softmax_scale)
    _check_tile_config(tile_config, "forward")


def check_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    tile_config: int,
) -> None:
    """Raises ValueError or TypeError unless the backward operator can answer this call."""
    _check_call(q, k, v, softmax_scale)
    for name, tensor in (("out", out), ("grad_out", grad_out)):
        _check_like(name, tensor, q)
        if tensor.shape != q.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, must be {tuple(q.shape)} like q"
            )
    batch, seqlen, heads, _ = q.shape
    dtype = accumulator_dtype(q.dtype)
    for name, given in (("lse", lse), ("grad_lse", grad_lse)):
        if given is None:
            continue
        _check_device(name, given, q)
        if given.dtype != dtype:
            raise TypeError(f"{name} has dtype {given.dtype}, must be {dtype}")
        if given.shape != (batch, heads, seqlen):
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, must be (batch, heads, seqlen_q) = "
                f"{(batch, heads, seqlen)}"
            )
    _check_tile_config(tile_config, "backward")


def _check_call(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> None:
    _check_alone("q", q)
    for name, tensor in (("k", k), ("v", v)):
        _check_like(name, tensor, q)
        _check_alone(name, tensor)
    _check_shapes(q, k, v)
    check_softmax_scale(softmax_scale)


def check_softmax_scale(softmax_scale: float) -> None:
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {softmax_scale}, must be finite and greater than 0")


def _check_tile_config(tile_config: int, of_pass: str) -> None:
    count = _TILES[of_pass]
    if tile_config != AUTOMATIC and not 0 <= tile_config < count:
        raise ValueError(
            f"tile_config is {tile_config}, must be {AUTOMATIC} (automatic) or an index "
            f"below {count}"
        )


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {q.device} like q")


def _check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    _check_device(name, tensor, q)
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, must be {q.dtype} like q")


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
