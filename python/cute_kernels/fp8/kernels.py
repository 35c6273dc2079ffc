"""Calls of the FP8 operators: what of a call the kernels take, and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cute_kernels.extension  # noqa: F401  defines the operators
from cute_kernels.checks import explain
from cute_kernels.chunks import Lengths
from cute_kernels.fp8.checks import (
    check_forward,
    check_rows,
    check_values,
    check_whole,
)
from cute_kernels.fp8.rotation import signed
from cute_kernels.fp8.tensor import ROW_BLOCK, FP8Tensor, Quantisation
from cute_kernels.fp8.varlen_checks import (
    check_varlen_forward,
    check_varlen_values,
    check_varlen_whole,
)

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
    if block != ROW_BLOCK:
        return None
    inputs = x, smooth, incoherent, signed(seed), dtype == torch.int8
    try:
        data, scale, shift = torch.ops.cute_kernels.quantize_fp8_rows(*inputs)
    except RuntimeError:
        explain(check_rows, *inputs)
        raise
    return FP8Tensor(data, scale, block, seed if incoherent else None, shift if smooth else None)


def attention_cuda(
    q: FP8Tensor,
    k: FP8Tensor,
    v: FP8Tensor,
    softmax_scale: float,
    causal: bool,
    out_dtype: torch.dtype,
    tile_config: str | None = None,
    sinks: Tensor | None = None,
    score_offset: Tensor | None = None,
    with_lse: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    sm_margin: int = 0,
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
        *(softmax_scale, causal, out_dtype == torch.float16, tile_config, sinks, score_offset),
    )
    options = {
        "with_lse": with_lse,
        "window_left": window_left,
        "window_right": window_right,
        "sm_margin": sm_margin,
    }
    try:
        out, lse = torch.ops.cute_kernels.flash_attn_fp8_forward(*inputs, **options)
    except RuntimeError:
        explain(check_forward, *inputs, **options)
        raise
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
    with_lse: bool = False,
    sinks: Tensor | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Output, LSE and what was subtracted from k: `quantize_cuda` of all three and `attention_cuda`
    in one call, whose kernels overlap. None for what it does not do or refuses. Without `with_lse`
    the LSE may be that of rounded P, and of k less what was subtracted."""
    if not GPU_BUILT or not all(map(_is_fusible, (q, k, v))):
        return None
    if dtype not in (torch.int8, torch.float8_e4m3fn) or not 0 <= seed < 2**64:
        return None
    batch, _, heads, head_dim = q.shape
    key_heads = k.shape[2]
    if key_heads == 0 or heads % key_heads:
        return None
    if v.shape[:3] != k.shape[:3] or (k.shape[0], k.shape[3]) != (batch, head_dim):
        return None
    inputs = (
        *(q, k, v, softmax_scale, causal, smooth_k, incoherent, signed(seed)),
        *(dtype == torch.int8, out_dtype == torch.float16, with_lse, sinks),
    )
    window = {"window_left": window_left, "window_right": window_right}
    try:
        out, lse, shift = torch.ops.cute_kernels.flash_attn_fp8(*inputs, **window)
    except RuntimeError:
        explain(check_whole, *inputs, **window)
        raise
    return out, lse, shift if smooth_k else None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    softmax_scale: float,
    causal: bool,
    how: Quantisation,
    out_dtype: torch.dtype,
    with_lse: bool,
    sinks: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_fp8_varlen_func`'s operator, on a GPU or the CPU; options are its keyword-only
    inputs."""
    inputs = (
        *(q, k, v, *lengths, softmax_scale, causal, how.smooth_k, how.incoherent, signed(how.seed)),
        *(how.qk_dtype == torch.int8, out_dtype == torch.float16, with_lse, sinks),
    )
    try:
        out, lse = torch.ops.cute_kernels.flash_attn_fp8_varlen(*inputs, **options)
    except RuntimeError:
        explain(check_varlen_whole, *inputs, **options)
        raise
    return out, lse


def varlen_attention_e4m3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    lengths: Lengths,
    softmax_scale: float,
    causal: bool,
    sinks: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The same of e4m3 tensors and scales of (batch, heads, 1)."""
    values = (v, lengths[1], lengths[3])
    try:
        data, _ = torch.ops.cute_kernels.quantize_fp8_varlen_values(*values)
    except RuntimeError:
        explain(check_varlen_values, *values)
        raise
    inputs = (q, k, data, *scales, *lengths, softmax_scale, causal, False, sinks)
    try:
        out, lse = torch.ops.cute_kernels.flash_attn_fp8_varlen_forward(*inputs, **options)
    except RuntimeError:
        explain(check_varlen_forward, *inputs, **options)
        raise
    return out, lse


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
    except RuntimeError:
        explain(check_values, v)
        raise
    return data, scale
