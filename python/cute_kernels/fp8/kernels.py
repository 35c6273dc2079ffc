"""The FP8 operators of the compiled extension: calls, and the shapes that torch.compile is told."""

from __future__ import annotations

import torch
from torch import Tensor

import cute_kernels.extension  # noqa: F401  defines the operators
from cute_kernels.fp8.tensor import ROW_BLOCK, FP8Tensor

GPU_BUILT = hasattr(torch.ops.cute_kernels, "flash_attn_fp8_forward")
GPU_ROTATIONS = (64, 128, 256)  # head dims that the fused kernel takes
_GPU_INPUTS = (torch.float16, torch.bfloat16)


def quantize_cuda(
    x: Tensor, incoherent: bool, seed: int, block: int | None, dtype: torch.dtype, smooth: bool
) -> FP8Tensor | None:
    """The fused kernels, which read x once; None for what they do not do."""
    if not GPU_BUILT or not _is_fusible(x):
        return None
    ops = torch.ops.cute_kernels
    if block is None and dtype == torch.float8_e4m3fn and not incoherent and not smooth:
        data, scale = ops.quantize_fp8_values(x)
        return FP8Tensor(data, scale.unsqueeze(2), None, keys=x.shape[1])
    if block != ROW_BLOCK or x.shape[3] not in GPU_ROTATIONS:
        return None
    data, scale, shift = ops.quantize_fp8_rows(
        x, smooth, incoherent, _signed(seed), dtype == torch.int8
    )
    return FP8Tensor(data, scale, block, seed if incoherent else None, shift if smooth else None)


def attention_cuda(
    q: FP8Tensor,
    k: FP8Tensor,
    v: FP8Tensor,
    softmax_scale: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    ops = torch.ops.cute_kernels
    for name, x in (("q", q), ("k", k)):
        if x.block != ROW_BLOCK and x.scale.shape[2] > 1:
            raise ValueError(
                f"{name} has scales of {x.block} rows, must be {ROW_BLOCK} or all rows on CUDA"
            )
    v_data = ops.quantize_fp8_values(v.data)[0] if v.keys is None else v.data
    v_scale = v.scale if v.block is not None else v.scale.squeeze(2)
    out, lse = ops.flash_attn_fp8_forward(
        q.data,
        k.data,
        v_data,
        q.scale,
        k.scale,
        v_scale,
        softmax_scale,
        causal,
        out_dtype == torch.float16,
    )
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
    out, lse, shift = torch.ops.cute_kernels.flash_attn_fp8(
        q,
        k,
        v,
        softmax_scale,
        causal,
        smooth_k,
        incoherent,
        _signed(seed),
        dtype == torch.int8,
        out_dtype == torch.float16,
    )
    return out, lse, shift if smooth_k else None


def _is_fusible(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in _GPU_INPUTS and x.dim() == 4 and x.shape[1] > 0


def _signed(seed: int) -> int:
    """Operators have no unsigned numbers."""
    return seed - 2**64 if seed >= 2**63 else seed


def _quantize_rows_fake(
    x: Tensor, smooth: bool, incoherent: bool, seed: int, to_int8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seqlen, heads, head_dim = x.shape
    data = x.new_empty(x.shape, dtype=torch.int8 if to_int8 else torch.float8_e4m3fn)
    blocks = (seqlen + ROW_BLOCK - 1) // ROW_BLOCK
    shift = (batch, heads, head_dim if smooth else 0)
    return (
        data,
        x.new_empty((batch, heads, blocks), dtype=torch.float32),
        x.new_empty(shift, dtype=torch.float32),
    )


def _quantize_values_fake(v: Tensor) -> tuple[Tensor, Tensor]:
    batch, seqlen, heads, head_dim = v.shape
    padded = (seqlen + 15) // 16 * 16
    data = v.new_empty((batch, heads, head_dim, padded), dtype=torch.float8_e4m3fn)
    channels = 0 if v.dtype == torch.float8_e4m3fn else head_dim
    return data, v.new_empty((batch, heads, channels), dtype=torch.float32)


def _outputs_fake(q: Tensor, out_float16: bool) -> tuple[Tensor, Tensor]:
    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(q.shape, dtype=torch.float16 if out_float16 else torch.bfloat16)
    return out, q.new_empty((batch, heads, seqlen), dtype=torch.float32)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    causal: bool,
    out_float16: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs_fake(q, out_float16)


def _whole_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    smooth_k: bool,
    incoherent: bool,
    seed: int,
    to_int8: bool,
    out_float16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shift = (k.shape[0], k.shape[2], k.shape[3] if smooth_k else 0)
    return *_outputs_fake(q, out_float16), k.new_empty(shift, dtype=torch.float32)


if GPU_BUILT:
    torch.library.register_fake("cute_kernels::quantize_fp8_rows", _quantize_rows_fake)
    torch.library.register_fake("cute_kernels::quantize_fp8_values", _quantize_values_fake)
    torch.library.register_fake("cute_kernels::flash_attn_fp8_forward", _forward_fake)
    torch.library.register_fake("cute_kernels::flash_attn_fp8", _whole_fake)
