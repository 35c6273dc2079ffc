"""Quantisation: one scale for each block of rows of a head, or for each channel. The kernels of
cute_kernels/fp8 do it in the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.fp8.kernels import quantize_cuda
from cute_kernels.fp8.rotation import U64, norm_of, rotate_unscaled
from cute_kernels.fp8.tensor import ROW_BLOCK, FP8Tensor, check_head_dim

SATURATION = 2.0**48  # the scores of saturated inputs are still finite in fp32
SMALLEST_MAXIMUM = 2.0**-60  # so that scales, their inverses and their products are finite
SAMPLES = 256  # rows, evenly spaced, whose mean or maximum stands for that of all
HEADROOM = 64.0  # of e4m3's range over the largest element of the samples

_INPUTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantize_fp8(
    x: Tensor,
    *,
    incoherent: bool = False,
    seed: int = 0,
    block: int | None = ROW_BLOCK,
    dtype: torch.dtype = torch.float8_e4m3fn,
    smooth: bool = False,
) -> FP8Tensor:
    """Quantises q or k (scales of row blocks) or v (``block=None``: scales of channels).

    Args:
        x: (batch, seqlen, heads, head_dim), float16, bfloat16, float32 or float64; head_dim is a
            multiple of 16 up to 256.
        incoherent: multiply every row by M first; the same seed for q and k.
        seed: of M's signs, 0 <= seed < 2**64.
        block: rows that share a scale, or None for one scale for each channel; that of e4m3 leaves
            room for elements 64 times larger than those of SAMPLES rows.
        dtype: float8_e4m3fn, or int8 for q and k: as fast in the tensor cores, and after incoherent
            processing, which leaves no outliers, about three times more precise.
        smooth: for k, subtract a row first: the mean of SAMPLES of its rows. Softmax does not
            see it, and the constant part of large channels is gone before it is spread.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    if x.dim() != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, must have 4 dimensions: "
            "(batch, seqlen, heads, head_dim)"
        )
    if x.dtype not in _INPUTS:
        names = ", ".join(str(d).removeprefix("torch.") for d in _INPUTS)
        raise TypeError(f"x has dtype {x.dtype}, must be one of {names}")
    if dtype not in _LARGEST:
        raise TypeError(f"dtype is {dtype}, must be torch.float8_e4m3fn or torch.int8")
    check_head_dim("x", x.shape[3])
    if block is not None and block < 1:
        raise ValueError(f"block is {block}, must be at least 1, or None")
    if not 0 <= seed <= U64:
        raise ValueError(f"seed is {seed}, must be at least 0 and below 2**64")
    fused = quantize_cuda(x, incoherent, seed, block, dtype, smooth)
    if fused is not None:
        return fused
    rows = x.float().clamp(-SATURATION, SATURATION)
    shift = None
    if smooth:
        shift = _sampled_mean(rows)
        rows = rows - shift.unsqueeze(1)
    norm = 1.0
    if incoherent:  # the norm is left to the scales
        rows, norm = rotate_unscaled(rows, seed), norm_of(x.shape[3])
    batch, seqlen, heads, head_dim = x.shape
    by_head = rows.transpose(1, 2)
    if block is None:
        factor, scale = _factor_and_scale(_channel_maximum(by_head, dtype), norm, dtype)
    else:
        blocks = -(-seqlen // block)
        padded = torch.nn.functional.pad(by_head, (0, 0, 0, blocks * block - seqlen))
        maximum = _maximum(padded.reshape(batch, heads, blocks, block, head_dim), (3, 4), dtype)
        factor, scale = _factor_and_scale(maximum, norm, dtype)
        factor = factor.flatten(2, 3).repeat_interleave(block, dim=2)[:, :, :seqlen]
        scale = scale.view(batch, heads, blocks)
    # Rounding of the product may pass the largest value by one bit of fp32.
    scaled = (by_head * factor).clamp(-_LARGEST[dtype], _LARGEST[dtype])
    data = _round(scaled, dtype).transpose(1, 2).contiguous()
    return FP8Tensor(data, scale, block, seed if incoherent else None, shift)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, within the range of dtype, rounded to nearest even; NaN stays NaN, or is 0 in int8."""
    if dtype == torch.int8:
        return x.nan_to_num(0.0).round().to(torch.int8)
    return x.to(dtype)


def _samples(x: Tensor, dim: int) -> Tensor:
    """Some of x's rows. NaN and saturated elements count as 0, so that one of them does not cost
    all rows their precision."""
    step = max(1, x.shape[dim] // SAMPLES)
    samples = x.index_select(dim, torch.arange(0, x.shape[dim], step, device=x.device))
    return torch.where(samples.abs() < SATURATION, samples, 0.0)


def _sampled_mean(x: Tensor) -> Tensor:
    """(batch, heads, head_dim)."""
    samples = _samples(x, 1)
    return samples.sum(1) / max(1, samples.shape[1])


def _channel_maximum(by_head: Tensor, dtype: torch.dtype) -> Tensor:
    """What is to be the largest number of each channel, (batch, heads, 1, head_dim). For e4m3 that
    of samples, with HEADROOM: a float is only coarser below 1/450 of that, and a kernel need not
    read all elements before it scales the first. In heads where an element is too large all the
    same, and in int8, that of all elements."""
    exact = _maximum(by_head, (2,), dtype)
    if dtype == torch.int8 or by_head.numel() == 0:
        return exact
    roomy = _samples(by_head, 2).abs().amax(2, keepdim=True) * HEADROOM
    roomy = roomy.clamp(SMALLEST_MAXIMUM, SATURATION)
    largest = _LARGEST[dtype]
    factor, _ = _factor_and_scale(roomy, 1.0, dtype)
    rounded = _round((by_head * factor).clamp(-largest, largest), dtype).float()
    fits = (rounded.abs() < largest).all(3, keepdim=True).all(2, keepdim=True)  # NaN does not
    return torch.where(fits, roomy, exact)


def _maximum(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The largest finite magnitude; NaN if there is one and dtype cannot hold it."""
    if 0 in (x.shape[dim] for dim in dims):
        return x.new_full([1 if d in dims else n for d, n in enumerate(x.shape)], SMALLEST_MAXIMUM)
    magnitudes = x.abs()
    if dtype != torch.int8:
        magnitudes = magnitudes.nan_to_num(0.0)
    return magnitudes.amax(dims, keepdim=True).clamp_min(SMALLEST_MAXIMUM)


def _factor_and_scale(maximum: Tensor, norm: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What elements are multiplied by before they are rounded, and what undoes it, and the lack of
    the norm."""
    largest = torch.full_like(maximum, _LARGEST[dtype])  # number / tensor would be a product
    return largest / maximum, maximum * norm / largest
