"""Quantisation: one scale for each block of rows of a head, or for each channel. The kernels of
cute_kernels/fp8 do it in the same bits. Nothing is copied to a GPU or back: a CUDA graph may
capture it."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import refuse_derivatives
from cute_kernels.fp8.checks import (
    check_input,
    check_quantisation,
    check_tensor,
)
from cute_kernels.fp8.kernels import quantize_cuda
from cute_kernels.fp8.rotation import norm_of, rotate_unscaled
from cute_kernels.fp8.tensor import E4M3, ROW_BLOCK, FP8Tensor

SATURATION = 2.0**48  # the scores of saturated inputs are still finite in fp32
SMALLEST_MAXIMUM = 2.0**-60  # so that scales, their inverses and their products are finite
SAMPLES = 256  # rows, evenly spaced, that stand for all
GROUPS = 32  # of samples: the threads of a kernel that share a channel
HEADROOM = 512.0  # of e4m3's range over the size of usual elements

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
            room for elements 512 times larger than what is usual in SAMPLES rows.
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
    check_quantisation(block, seed, dtype, incoherent=incoherent, smooth=smooth)
    refuse_derivatives("quantize_fp8", x, where=" in FP8")
    block = None if block is None else int(block)
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


def _sampled_rows(count: int) -> range:
    return range(0, count, max(1, count // SAMPLES))


def _samples(x: Tensor, dim: int) -> Tensor:
    """Some of x's rows. NaN and saturated elements count as 0, so that one of them does not cost
    all rows their precision."""
    rows = _sampled_rows(x.shape[dim])
    index = torch.arange(0, rows.stop, rows.step, device=x.device)
    samples = x.index_select(dim, index)
    return samples.masked_fill(~(samples.abs() < SATURATION), 0.0)


def _sampled_center(x: Tensor) -> Tensor:
    """What most of a head's rows have in common, (batch, heads, head_dim).

    As near to all rows as their mean where they are alike, but outliers do not move it, which would
    cost all the others their precision. The samples are dealt to GROUPS groups in turn. A group's
    number is the mean of the medians of its samples taken three at a time, the last one again where
    some lack; the result is the median of the groups.
    """
    count = len(_sampled_rows(x.shape[1]))
    groups = min(count, GROUPS)
    if groups == 0:
        return x.new_zeros((x.shape[0], *x.shape[2:]))
    group = torch.arange(groups, device=x.device)
    counts = (count - group + GROUPS - 1) // GROUPS
    triples = (count + 3 * GROUPS - 1) // (3 * GROUPS)
    turn = torch.arange(3 * triples, device=x.device).unsqueeze(1)
    index = (torch.minimum(turn, counts - 1) * GROUPS + group).flatten()
    dealt = _samples(x, 1).index_select(1, index)
    dealt = dealt.view(x.shape[0], triples, 3, groups, *x.shape[2:])
    total = torch.zeros_like(dealt[:, 0, 0])
    for triple in range(triples):  # in this order: the same bits on all devices
        a, b, c = dealt[:, triple].unbind(1)
        median = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
        missing = (counts <= 3 * triple).view(1, -1, 1, 1)
        total = total + median.masked_fill(missing, 0.0)
    means = (total / ((counts + 2) // 3).float().view(1, -1, 1, 1)).sort(1).values
    return (means[:, (groups - 1) // 2] + means[:, groups // 2]) * 0.5


def _channel_maximum(by_head: Tensor, dtype: torch.dtype) -> Tensor:
    """What is to be the largest number of each channel, (batch, heads, 1, head_dim). For e4m3
    HEADROOM times the size of usual elements, or the largest of the samples: a float is only
    coarser below 1/56 of that size, and a kernel need not read all elements before it scales the
    first. In heads where an element is too large all the same, and in int8, the largest of all.

    The usual size is a geometric mean, of numbers that are not 0: outliers hardly move it, and a
    mean of floats' bits is nearly one of logarithms, exact in any order.
    """
    exact = _maximum(by_head, (2,), dtype)
    if dtype == torch.int8 or by_head.numel() == 0:
        return exact
    sizes = _samples(by_head, 2).abs()
    sizes = sizes.masked_fill(sizes < SMALLEST_MAXIMUM, 0.0)
    count = (sizes > 0).sum(2, keepdim=True).clamp_min(1)
    logarithm = (sizes.view(torch.int32) >> 16).sum(2, keepdim=True) // count
    usual = (logarithm << 16).to(torch.int32).view(torch.float32)
    roomy = torch.maximum(usual * HEADROOM, sizes.amax(2, keepdim=True))
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
