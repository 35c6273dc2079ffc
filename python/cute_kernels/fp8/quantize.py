"""Quantisation: one scale for each block of rows of a head, or for each channel. The kernels of
cute_kernels/fp8 do it in the same bits. Nothing is copied to a GPU or back: a CUDA graph may
capture it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cute_kernels.fp8.checks import (
    E4M3,
    check_input,
    check_quantisation,
    check_tensor,
    refuse_derivatives,
)
from cute_kernels.fp8.kernels import quantize_cuda
from cute_kernels.fp8.rotation import norm_of, rotate_unscaled
from cute_kernels.fp8.tensor import ROW_BLOCK, FP8Tensor

SATURATION = 2.0**48  # the scores of saturated inputs are still finite in fp32
SMALLEST_MAXIMUM = 2.0**-60  # so that scales, their inverses and their products are finite
SAMPLES = 256  # rows, evenly spaced, that stand for all
GROUPS = 32  # of samples: the threads of a kernel that share a channel
HEADROOM = 256.0  # of e4m3's range over the size of usual elements

_LARGEST = {E4M3: 448.0, torch.int8: 127.0}


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
            room for elements 256 times larger than what is usual in SAMPLES rows.
        dtype: float8_e4m3fn, or int8 for q and k: as fast in the tensor cores, and after incoherent
            processing, which leaves no outliers, about three times more precise.
        smooth: for k, subtract a row first: what most of SAMPLES of its rows have in common.
            Softmax does not see it, and the constant part of large channels is gone before it is
            spread.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NotImplementedError: a derivative is asked for.
    """
    check_tensor("x", x)
    check_input("x", x)
    check_quantisation(block, seed, dtype)
    refuse_derivatives("quantize_fp8", x)
    fused = quantize_cuda(x, incoherent, seed, block, dtype, smooth)
    if fused is not None:
        return fused
    return quantize_by_operations(x, incoherent, seed, block, dtype, smooth)


def quantize_by_operations(
    x: Tensor, incoherent: bool, seed: int, block: int | None, dtype: torch.dtype, smooth: bool
) -> FP8Tensor:
    """quantize_fp8 in PyTorch's operations, of checked arguments, on any device."""
    rows = x.float().clamp(-SATURATION, SATURATION)
    shift = None
    if smooth:
        shift = _sampled_center(rows)
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
    """Some of x's rows, dealt to GROUPS groups in turn: dim becomes (rounds, groups), filled up
    with zeros. NaN and saturated elements count as 0, so that one of them does not cost all rows
    their precision."""
    step = max(1, x.shape[dim] // SAMPLES)
    samples = x.index_select(dim, torch.arange(0, x.shape[dim], step, device=x.device))
    samples = samples.masked_fill(~(samples.abs() < SATURATION), 0.0)
    rounds = (samples.shape[dim] + GROUPS - 1) // GROUPS
    padding = (0, 0) * (x.dim() - 1 - dim) + (0, rounds * GROUPS - samples.shape[dim])
    padded = torch.nn.functional.pad(samples, padding)
    return padded.reshape(*x.shape[:dim], rounds, GROUPS, *x.shape[dim + 1 :])


def _median_of_means(samples: Tensor, counts: Tensor, dim: int) -> Tensor:
    """Over the groups that count something, 0 without any; dim is the samples' rounds. As near to
    all rows as their mean where they are alike, and not moved by outliers."""
    total = samples.new_zeros(counts.shape)
    for part in samples.unbind(dim):  # in this order: the same bits on all devices
        total = total + part
    counts_something = counts > 0
    means = (total / counts.clamp_min(1.0)).masked_fill(~counts_something, math.inf)
    means = means.sort(dim).values
    groups = counts_something.sum(dim, keepdim=True)
    low = means.gather(dim, (groups - 1).clamp_min(0) // 2)
    high = means.gather(dim, groups // 2)
    return ((low + high) * 0.5).masked_fill(groups == 0, 0.0)


def _sampled_center(x: Tensor) -> Tensor:
    """What most of a head's rows have in common, (batch, heads, head_dim). Outliers do not move it,
    which would cost all other rows their precision."""
    samples = _samples(x, 1)
    group = torch.arange(GROUPS, device=x.device).view(1, -1, 1, 1)
    count = len(range(0, x.shape[1], max(1, x.shape[1] // SAMPLES)))
    counts = ((count - group + GROUPS - 1) // GROUPS).float()
    counts = counts.expand(samples.shape[0], *samples.shape[2:])
    return _median_of_means(samples, counts, 1).squeeze(1)


def _channel_maximum(by_head: Tensor, dtype: torch.dtype) -> Tensor:
    """What is to be the largest number of each channel, (batch, heads, 1, head_dim). For e4m3
    HEADROOM times the size of usual elements, or the largest of the samples: a float is only
    coarser below 1/110 of that size, and a kernel need not read all elements before it scales the
    first. In heads where an element is too large all the same, and in int8, the largest of all."""
    exact = _maximum(by_head, (2,), dtype)
    if dtype == torch.int8 or by_head.numel() == 0:
        return exact
    sizes = _samples(by_head, 2).abs()
    sizes = sizes.masked_fill(sizes < SMALLEST_MAXIMUM, 0.0)
    roomy = _median_of_means(sizes, (sizes > 0).sum(2).float(), 2) * HEADROOM
    roomy = torch.maximum(roomy, sizes.amax((2, 3)).unsqueeze(2))
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
