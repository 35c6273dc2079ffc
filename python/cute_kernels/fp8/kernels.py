"""Calls of the FP8 operators: what of a call the kernels take, and how."""

from __future__ import annotations

import torch
from torch import Tensor

import cute_kernels.extension  # noqa: F401  defines the operators
from cute_kernels.checks import explain
from cute_kernels.fp8.checks import (
    GPU_ROTATIONS,
    check_forward,
    check_rows,
    check_values,
    check_whole,
)
from cute_kernels.fp8.rotation import signed
from cute_kernels.fp8.tensor import ROW_BLOCK, FP8Tensor

GPU_BUILT = hasattr(torch.ops.cute_kernels, "flash_attn_fp8_forward")
_GPU_INPUTS = (torch.float16, torch.bfloat16)


def quantize_cuda(
    x: Tensor, incoherent: bool, seed: int, block: int | None, dtype: torch.dtype, smooth: bool
) -> FP8Tensor | None:
    """The fused kernels, which read x once; None for what they do not do."""
    if not GPU_BUILT or not _is_fusible(x):
        return None
    if block is None and dtype == torch.float8_e4m3fn and not incoherent and not smooth:
        data, scale = _quantize_values(x)
        return FP8Tensor(data, scale.unsqueeze(2), None, keys=x.shape[1])
    if block != ROW_BLOCK or x.shape[3] not in GPU_ROTATIONS:
        return None
    inputs = x, smooth, incoherent, signed(seed), dtype == torch.int8
    try:
        data, scale, shift = torch.ops.cute_kernels.quantize_fp8_rows(*inputs)
    except RuntimeError as refusal:
        explain(refusal, check_rows, *inputs)
    return FP8Tensor(data, scale, block, seed if incoherent else None, shift if smooth else None)


def attention_cuda(
    q: FP8Tensor,
    k: FP8Tensor,
    v: FP8Tensor,
    softmax_scale: float,
    causal: bool,
    out_dtype: torch.dtype,
    tile_config: str | None = None,
) -> tuple[Tensor, Tensor]:
    for name, x in (("q", q), ("k", k)):
        if x.block != ROW_BLOCK and x.scale.shape[2] > 1:
            raise ValueError(
                f"{name} has scales of {x.block} rows, must be {ROW_BLOCK} or all rows on CUDA"
            )
    v_data = _quantize_values(v.data)[0] if v.keys is None else v.data
    v_scale = v.scale if v.block is not None else v.scale.squeeze(2)
    inputs = (
        *(q.data, k.data, v_data, q.scale, k.scale, v_scale),
        *(softmax_scale, causal, out_dtype == torch.float16, tile_config),
    )
    try:
        out, lse = torch.ops.cute_kernels.flash_attn_fp8_forward(*inputs)
    except RuntimeError as refusal:
        explain(refusal, check_forward, *inputs)
    return out, lse


def whole_attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    smooth_k: bool,
    incoherent: bool,
    seed: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Output, LSE and what was subtracted from k: `quantize_cuda` of all three and `attention_cuda`
    in one call, whose kernels overlap. None for what it does not do or refuses."""
    if not GPU_BUILT or not all(map(_is_fusible, (q, k, v))):
        return None
    if dtype not in (torch.int8, torch.float8_e4m3fn) or not 0 <= seed < 2**64:
        return None
    batch, _, heads, head_dim = q.shape
    key_heads = k.shape[2]
    if head_dim not in GPU_ROTATIONS or key_heads == 0 or heads % key_heads:
        return None
    if v.shape != k.shape or (k.shape[0], k.shape[3]) != (batch, head_dim):
        return None
    inputs = (
        *(q, k, v, softmax_scale, causal, smooth_k, incoherent, signed(seed)),
        *(dtype == torch.int8, out_dtype == torch.float16),
    )
    try:
        out, lse, shift = torch.ops.cute_kernels.flash_attn_fp8(*inputs)
    except RuntimeError as refusal:
        explain(refusal, check_whole, *inputs)
    return out, lse, shift if smooth_k else None


def _is_fusible(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in _GPU_INPUTS
        and x.dim() == 4
        and x.shape[1] > 0
        and x.stride(3) == 1
    )


def _quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    try:
        data, scale = torch.ops.cute_kernels.quantize_fp8_values(v)
    except RuntimeError as refusal:
        explain(refusal, check_values, v)
    return data, scale
