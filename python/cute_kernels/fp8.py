"""FP8 attention: quantisation, and the CPU path of the FP8 kernel's arithmetic.

Quantisation follows FlashAttention-3 (arXiv 2407.08608, section 3.3): one scale for each block of
rows of a head, and incoherent processing: Q and K are multiplied by the same random orthogonal
matrix M before they are rounded, which leaves Q K^T as it is and spreads outliers over channels.

M = H diag(signs) / sqrt(d), with H a Hadamard matrix where d is a power of two. Other d = m 2^n
(m odd) take the Kronecker product of the reflection I - (2/m) J of order m and a Hadamard matrix.

Every input has a defined result: what is beyond +-SATURATION counts as +-SATURATION, NaN stays NaN
(in its whole row after incoherent processing; in int8, which has none, in its block by the scale),
and a block of zeros has a finite scale.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

import cute_kernels.extension  # noqa: F401  defines the operators
from cute_kernels.reference import _Blocks
from cute_kernels.tiles import tile_configs

ROW_BLOCK = 64  # rows of Q and K that share a scale
# What flash_attn_fp8_func makes of Q and K: int8's error is half of e4m3's after incoherent
# processing, at a few percent of speed (docs/fp8.md).
QK_DTYPE = torch.int8
HEAD_DIM_MULTIPLE = 16
MAX_HEAD_DIM = 256
SATURATION = 2.0**48  # the scores of saturated inputs are still finite in fp32
SMALLEST_MAXIMUM = 2.0**-60  # so that scales, their inverses and their products are finite

# P is rounded to e4m3 as 2^(score - origin + shift), where the origin follows the row's maximum
# once it is passed by more than slack: at most 2^(shift + slack), below e4m3's 448.
P_SHIFT, P_SLACK = 6.0, 2.0
# Kernels with linear_exp take P to be linear between powers of two (ScaledSoftmax in
# fp8_softmax.hpp). Small P are wrong then: hence another range.
LINEAR_P_SHIFT, LINEAR_P_SLACK = 7.0, 1.5
LINEAR_BIAS = 7 - 0.0563

# Position p of 16 keys of a transposed v holds key KEY_ORDER[p]: value_key_order in fp8_traits.hpp.
KEY_ORDER = [p % 4 // 2 * 8 + p // 4 * 2 + p % 2 for p in range(16)]
GPU_ROTATIONS = (64, 128, 256)  # head dims that the fused kernel takes
GPU_BUILT = hasattr(torch.ops.cute_kernels, "flash_attn_fp8_forward")
KEY_SAMPLES = 256  # rows of K, evenly spaced, whose mean stands for the mean of all

_INPUTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GPU_INPUTS = (torch.float16, torch.bfloat16)
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_U64 = 2**64 - 1


@dataclass(frozen=True)
class FP8Tensor:
    """A quantised tensor: `data` times `scale` is what it stands for, times M if there is a seed,
    less `shift` if there is one.

    Attributes:
        data: (batch, seqlen, heads, head_dim), float8_e4m3fn (or int8).
        scale: float32, (batch, heads, blocks) with one for every `block` rows, or
            (batch, heads, 1, head_dim) with one for every channel, if `block` is None.
        block: rows that share a scale; None for scales of channels.
        seed: of the signs of incoherent processing; None without.
        shift: float32, (batch, heads, head_dim), what was subtracted from every row; None without.
        keys: None, or for a v that was quantised on a GPU its seqlen: there `data` is (batch,
            heads, head_dim, padded keys) in the key order that the kernel reads.
    """

    data: Tensor
    scale: Tensor
    block: int | None = ROW_BLOCK
    seed: int | None = None
    shift: Tensor | None = None
    keys: int | None = None

    @property
    def shape(self) -> torch.Size:
        """(batch, seqlen, heads, head_dim)."""
        if self.keys is None:
            return self.data.shape
        batch, heads, head_dim, _ = self.data.shape
        return torch.Size((batch, self.keys, heads, head_dim))

    def rows(self) -> Tensor:
        """`data` as (batch, seqlen, heads, head_dim)."""
        if self.keys is None:
            return self.data
        inverse = sorted(range(16), key=KEY_ORDER.__getitem__)
        batch, heads, head_dim, padded = self.data.shape
        bits = self.data.view(torch.uint8).reshape(batch, heads, head_dim, padded // 16, 16)
        ordered = bits[..., inverse].reshape(batch, heads, head_dim, padded)[..., : self.keys]
        return ordered.permute(0, 3, 1, 2).contiguous().view(self.data.dtype)

    def row_scales(self) -> Tensor:
        """The scales, to be broadcast to data's shape."""
        if self.block is None:
            return self.scale.permute(0, 2, 1, 3)
        rows = self.scale.repeat_interleave(self.block, dim=2)[:, :, : self.shape[1]]
        return rows.transpose(1, 2).unsqueeze(-1)

    def dequantize(self) -> Tensor:
        """The float32 tensor that this stands for, with M and the shift undone."""
        x = self.rows().float() * self.row_scales()
        if self.seed is not None:
            x = rotate_back(x, self.seed)
        return x if self.shift is None else x + self.shift.unsqueeze(1)


def random_signs(head_dim: int, seed: int) -> list[int]:
    """+1 or -1 for every channel: the top bit of SplitMix64's output number `channel`.

    A function of seed and channel alone, which the CUDA kernel computes in the same bits.
    """
    signs = []
    for channel in range(head_dim):
        z = (seed + (channel + 1) * 0x9E3779B97F4A7C15) & _U64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _U64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _U64
        z ^= z >> 31
        signs.append(-1 if z >> 63 else 1)
    return signs


@functools.lru_cache(maxsize=64)
def _signs_tensor(head_dim: int, seed: int, device: torch.device) -> Tensor:
    return torch.tensor(random_signs(head_dim, seed), dtype=torch.float32, device=device)


def _orthogonal(x: Tensor) -> Tensor:
    """x H / sqrt(d) over the last dimension, in fp32: butterflies of stride 1, 2, 4, ..., as the
    CUDA kernel's, then the reflection of order m over the d / m runs. Its own inverse."""
    head_dim = x.shape[-1]
    power = head_dim & -head_dim
    odd = head_dim // power
    stride = 1
    while stride < power:
        pairs = x.reshape(*x.shape[:-1], head_dim // (2 * stride), 2, stride)
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        stride *= 2
    if odd > 1:
        runs = x.reshape(*x.shape[:-1], odd, power)
        x = (runs - runs.sum(-2, keepdim=True) * (2 / odd)).view(x.shape)
    return x * float(power**-0.5)


def rotate(x: Tensor, seed: int) -> Tensor:
    """M x for every row, in float32."""
    return _orthogonal(x.float() * _signs_tensor(x.shape[-1], seed, x.device))


def rotate_back(x: Tensor, seed: int) -> Tensor:
    """M^T x for every row, in float32."""
    return _orthogonal(x.float()) * _signs_tensor(x.shape[-1], seed, x.device)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, within the range of dtype, rounded to nearest even; NaN stays NaN, or is 0 in int8."""
    if dtype == torch.int8:
        return x.nan_to_num(0.0).round().to(torch.int8)
    return x.to(dtype)


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
        block: rows that share a scale, or None for one scale for each channel.
        dtype: float8_e4m3fn, or int8 for q and k: as fast in the tensor cores, and after incoherent
            processing, which leaves no outliers, about three times more precise.
        smooth: for k, subtract a row first: the mean of KEY_SAMPLES of its rows. Softmax does not
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
    _check_head_dim("x", x.shape[3])
    if block is not None and block < 1:
        raise ValueError(f"block is {block}, must be at least 1, or None")
    if not 0 <= seed <= _U64:
        raise ValueError(f"seed is {seed}, must be at least 0 and below 2**64")
    if GPU_BUILT and x.is_cuda and x.dtype in _GPU_INPUTS:
        fused = _quantize_cuda(x, incoherent, seed, block, dtype, smooth)
        if fused is not None:
            return fused
    rows = x.float().clamp(-SATURATION, SATURATION)
    shift = None
    if smooth:
        shift = _sampled_mean(rows)
        rows = rows - shift.unsqueeze(1)
    if incoherent:
        rows = rotate(rows, seed)
    batch, seqlen, heads, head_dim = x.shape
    by_head = rows.transpose(1, 2)
    if block is None:
        maximum = _maximum(by_head, (2,), dtype)
        factor, scale = _factor_and_scale(maximum, dtype)
    else:
        blocks = -(-seqlen // block)
        padded = torch.nn.functional.pad(by_head, (0, 0, 0, blocks * block - seqlen))
        maximum = _maximum(padded.reshape(batch, heads, blocks, block, head_dim), (3, 4), dtype)
        factor, scale = _factor_and_scale(maximum, dtype)
        factor = factor.flatten(2, 3).repeat_interleave(block, dim=2)[:, :, :seqlen]
        scale = scale.view(batch, heads, blocks)
    # Rounding of the product may pass the largest value by one bit of fp32.
    scaled = (by_head * factor).clamp(-_LARGEST[dtype], _LARGEST[dtype])
    data = _round(scaled, dtype).transpose(1, 2).contiguous()
    return FP8Tensor(data, scale, block, seed if incoherent else None, shift)


def _quantize_cuda(
    x: Tensor, incoherent: bool, seed: int, block: int | None, dtype: torch.dtype, smooth: bool
) -> FP8Tensor | None:
    """The fused kernels, which read x once; None for what they do not do."""
    ops = torch.ops.cute_kernels
    if x.shape[1] == 0:
        return None
    if block is None and dtype == torch.float8_e4m3fn and not incoherent and not smooth:
        data, scale = ops.quantize_fp8_values(x)
        return FP8Tensor(data, scale.unsqueeze(2), None, keys=x.shape[1])
    if block != ROW_BLOCK or x.shape[3] not in GPU_ROTATIONS:
        return None
    shift = ops.fp8_key_mean(x) if smooth else None
    signed_seed = seed - 2**64 if seed >= 2**63 else seed  # operators have no unsigned numbers
    data, scale = ops.quantize_fp8_rows(x, shift, incoherent, signed_seed, dtype == torch.int8)
    return FP8Tensor(data, scale, block, seed if incoherent else None, shift)


def _attention_cuda(
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


def _sampled_mean(x: Tensor) -> Tensor:
    """The mean of some rows of every head: (batch, heads, head_dim). NaN and saturated elements
    count as 0, so that one of them does not cost all rows their precision."""
    step = max(1, x.shape[1] // KEY_SAMPLES)
    samples = x[:, ::step]
    samples = torch.where(samples.abs() < SATURATION, samples, 0.0)
    return samples.sum(1) / max(1, samples.shape[1])


def _maximum(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The largest finite magnitude; NaN if there is one and dtype cannot hold it."""
    if 0 in (x.shape[dim] for dim in dims):
        return x.new_full([1 if d in dims else n for d, n in enumerate(x.shape)], SMALLEST_MAXIMUM)
    magnitudes = x.abs()
    if dtype != torch.int8:
        magnitudes = magnitudes.nan_to_num(0.0)
    return magnitudes.amax(dims, keepdim=True).clamp_min(SMALLEST_MAXIMUM)


def _factor_and_scale(maximum: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What elements are multiplied by before they are rounded, and what undoes it."""
    largest = torch.full_like(maximum, _LARGEST[dtype])  # number / tensor would be a product
    return largest / maximum, maximum / largest


def flash_attn_fp8_func(
    q: Tensor | FP8Tensor,
    k: Tensor | FP8Tensor,
    v: Tensor | FP8Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    incoherent: bool = True,
    seed: int = 0,
    smooth_k: bool = True,
    qk_dtype: torch.dtype = QK_DTYPE,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in FP8, from tensors of any float dtype or from tensors quantised before.

    Q and K are quantised in blocks of rows, V by channels; P is rounded to e4m3. Sums are in
    float32.

    Args:
        q, k, v: (batch, seqlen, heads, head_dim) as in `flash_attn_func`, or the results of
            `quantize_fp8`: q and k with the same seed and dtype, v without incoherent processing.
        softmax_scale: finite, greater than 0; ``head_dim ** -0.5`` if None.
        causal: query i sees key j only if ``j <= i + seqlen_k - seqlen_q``.
        incoherent, seed, smooth_k, qk_dtype: of the quantisation of q and k that come as they are;
            see `quantize_fp8`.
        out_dtype: float16 or bfloat16 (float32 on the CPU); q's dtype if None, bfloat16 if q comes
            quantised.
        return_lse: also return the natural logarithm of the softmax's denominator, (batch, heads,
            seqlen_q), float32; up to head dim 128 within about 0.03 of that of the quantised
            tensors, because P's row sums are those of rounded P.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NotImplementedError: a gradient is asked for, or a tensor is on a GPU and the build has no
            FP8 kernels.
        RuntimeError: the GPU is not of compute capability 9.0, or an argument on CUDA is not as
            described.
    """
    if out_dtype is None:
        out_dtype = torch.bfloat16 if isinstance(q, FP8Tensor) else q.dtype
    if out_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"out_dtype is {out_dtype}, must be float16, bfloat16 or float32")
    device = (q.data if isinstance(q, FP8Tensor) else q).device
    for name, x in (("k", k), ("v", v)):
        found = (x.data if isinstance(x, FP8Tensor) else x).device
        if found != device:
            raise ValueError(f"{name} is on {found}, must be on {device} like q")
    if device.type == "cuda":
        _check_built(device)
    if device.type == "cuda" and out_dtype == torch.float32:
        raise TypeError("out_dtype is torch.float32, must be float16 or bfloat16 on CUDA")
    _refuse_gradients("flash_attn_fp8_func", q, k, v)
    original_q = q
    if not isinstance(q, FP8Tensor):
        q = quantize_fp8(q, incoherent=incoherent, seed=seed, dtype=qk_dtype)
    if not isinstance(k, FP8Tensor):
        k = quantize_fp8(
            k,
            incoherent=q.seed is not None,
            seed=q.seed or 0,
            dtype=q.data.dtype,
            smooth=smooth_k,
        )
    if not isinstance(v, FP8Tensor):
        v = quantize_fp8(v, block=None)
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5 if q.data.dim() == 4 else 1.0
    out, lse = _attention_quantised(q, k, v, softmax_scale, causal, out_dtype)
    if return_lse and k.shift is not None:
        with torch.autocast(device.type, enabled=False):
            lse = lse + _lse_of_shift(original_q, k.shift, softmax_scale)
    return (out, lse) if return_lse else out


def flash_attn_e4m3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output, in bfloat16, and LSE of e4m3 tensors with a number for each key head, as
    FlashAttention-3's function of the same arguments."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.float8_e4m3fn:
            why = "with descales" if name == "q" else "like q"
            raise TypeError(f"{name} has dtype {x.dtype}, must be torch.float8_e4m3fn {why}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, must be on {q.device} like q")
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must have 4 dimensions")
    _refuse_gradients("flash_attn_func", q, k, v)
    heads, key_heads = q.shape[2], k.shape[2]
    pairs = (k.shape[0], key_heads)
    group = heads // key_heads if key_heads else 1

    def scaled(name: str, x: Tensor, descale: Tensor | None, repeats: int) -> FP8Tensor:
        if descale is None:
            scale = torch.ones((1, 1, 1), device=x.device).expand(*pairs, 1)
        elif tuple(descale.shape) != pairs:
            raise ValueError(
                f"{name} has shape {tuple(descale.shape)}, must be (batch, key heads) = {pairs}"
            )
        elif descale.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {descale.dtype}, must be torch.float32")
        elif descale.device != x.device:
            raise ValueError(f"{name} is on {descale.device}, must be on {x.device} like q")
        else:
            scale = descale.unsqueeze(2)
        if repeats > 1:
            scale = scale.repeat_interleave(repeats, dim=1)
        return FP8Tensor(x, scale[:, :, : x.shape[1]], max(1, x.shape[1]))

    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5 if q.shape[3] else 1.0
    return _attention_quantised(
        scaled("q_descale", q, q_descale, group),
        scaled("k_descale", k, k_descale, 1),
        scaled("v_descale", v, v_descale, 1),
        softmax_scale,
        causal,
        torch.bfloat16,
    )


def _refuse_gradients(function: str, *tensors: Tensor | FP8Tensor) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise NotImplementedError(
            f"{function} has no gradient in FP8: call it under torch.no_grad() or on tensors that "
            "need no gradient"
        )


def _attention_quantised(
    q: FP8Tensor,
    k: FP8Tensor,
    v: FP8Tensor,
    softmax_scale: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output and LSE, checked, on whatever device the tensors are on."""
    _check_call(q, k, v)
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {softmax_scale}, must be finite and greater than 0")
    if q.data.is_cuda:
        _check_built(q.data.device)
        return _attention_cuda(q, k, v, softmax_scale, causal, out_dtype)
    with torch.autocast(q.data.device.type, enabled=False):
        out, lse = _attention(q, k, v, softmax_scale, causal)
    return out.to(out_dtype), lse


def _check_built(device: torch.device) -> None:
    if not GPU_BUILT:
        raise NotImplementedError(
            f"q is on {device}, and this build has no FP8 kernels (CUTE_KERNELS_FP8=OFF)"
        )


def _lse_of_shift(q: Tensor | FP8Tensor, shift: Tensor, softmax_scale: float) -> Tensor:
    """What the row that was subtracted from k adds to a query's scores, and so to its LSE."""
    rows = q.dequantize() if isinstance(q, FP8Tensor) else q.float()
    rows = rows.clamp(-SATURATION, SATURATION)
    shift = shift.repeat_interleave(rows.shape[2] // max(1, shift.shape[1]), dim=1)
    return softmax_scale * (rows * shift.unsqueeze(1)).sum(-1).transpose(1, 2)


def _check_head_dim(name: str, head_dim: int) -> None:
    if head_dim % HEAD_DIM_MULTIPLE != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name} has head_dim {head_dim}, must be a multiple of {HEAD_DIM_MULTIPLE} "
            f"from {HEAD_DIM_MULTIPLE} to {MAX_HEAD_DIM}"
        )


def _check_call(q: FP8Tensor, k: FP8Tensor, v: FP8Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.data.shape)}, must have 4 dimensions")
        batch, seqlen, heads, head_dim = x.shape
        _check_head_dim(name, head_dim)
        expected: tuple[int, ...] = (batch, heads, 1, head_dim)
        if x.block is not None:
            expected = (batch, heads, -(-seqlen // x.block))
        if tuple(x.scale.shape) != expected:
            raise ValueError(
                f"{name}'s scale has shape {tuple(x.scale.shape)}, must be {expected} "
                f"for block {x.block}"
            )
    if q.block is None or k.block is None:
        raise ValueError("q and k need scales of row blocks, not of channels (block=None)")
    if v.block is not None and v.scale.shape[2] > 1:
        raise ValueError("v needs one scale for a head or for each channel (block=None)")
    if q.seed != k.seed:
        raise ValueError(f"k has seed {k.seed}, must be {q.seed} like q")
    for name, x in (("q", q), ("v", v)):
        if x.shift is not None:
            raise ValueError(f"{name} has a shift, which only k may have")
    if v.seed is not None:
        raise ValueError(f"v has seed {v.seed}, must be quantised without incoherent processing")
    if k.data.dtype != q.data.dtype:
        raise TypeError(f"k has dtype {k.data.dtype}, must be {q.data.dtype} like q")
    if v.data.dtype != torch.float8_e4m3fn:
        raise TypeError(f"v has dtype {v.data.dtype}, must be torch.float8_e4m3fn")
    batch, _, heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != batch:
            raise ValueError(f"{name} has batch {x.shape[0]}, must be {batch} like q")
        if x.shape[3] != head_dim:
            raise ValueError(f"{name} has head_dim {x.shape[3]}, must be {head_dim} like q")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(
            f"v has seqlen and heads {tuple(v.shape[1:3])}, must be {tuple(k.shape[1:3])} like k"
        )
    if heads and (k.shape[2] == 0 or heads % k.shape[2]):
        raise ValueError(f"q has {heads} heads, must be a multiple of k's {k.shape[2]}")


def _attention(
    q: FP8Tensor, k: FP8Tensor, v: FP8Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The kernel's arithmetic, in units of powers of two: exact products of 8-bit numbers, scaled;
    a lazily moving origin; P in e4m3; V's scale at the end."""
    batch, seqlen, heads, head_dim = q.data.shape
    linear = uses_linear_exp(head_dim)
    shift, slack = (LINEAR_P_SHIFT, LINEAR_P_SLACK) if linear else (P_SHIFT, P_SLACK)
    out = torch.zeros(q.data.shape, dtype=torch.float32)
    lse = torch.full((batch, heads, seqlen), -math.inf)
    if out.numel() == 0 or k.data.numel() == 0:
        return out, lse
    to_log2 = softmax_scale * math.log2(math.e)
    blocks = _Blocks(q.data, k.data, 1.0, causal)
    all_k, all_v = blocks.all_keys(k.data), blocks.all_keys(v.rows())
    q_scales = q.row_scales() * to_log2
    k_scales = k.row_scales().permute(0, 2, 3, 1)  # (batch, key heads, 1, seqlen_k)
    for queries in blocks.queries():
        q_rows, q_scale = blocks.rows(q.data, queries), blocks.rows(q_scales, queries)
        accumulator = torch.zeros_like(q_rows)
        origin = q_rows.new_full((*q_rows.shape[:3], 1), -math.inf)
        total = torch.zeros_like(origin)
        for keys, hidden in blocks.keys(queries):
            products = blocks.scores(q_rows, all_k[:, :, keys], hidden)
            scores = products * (q_scale * k_scales[..., keys])
            maximum = scores.amax(-1, keepdim=True)
            new_origin = torch.where(maximum <= origin + slack, origin, maximum)  # NaN moves it
            finite = new_origin.masked_fill(new_origin == -math.inf, 0.0)
            rescale = torch.exp2(origin - finite)
            origin = new_origin
            p, rounded = _probabilities(scores - (finite - shift), linear)
            total = total * rescale + p.sum(-1, keepdim=True)
            accumulator = accumulator * rescale + rounded @ all_v[:, :, keys]
        accumulator /= total.masked_fill(total == 0, 1.0)
        out[:, queries] = blocks.from_rows(accumulator)
        log2_sum = (origin - shift + total.log2()).masked_fill(total == 0, -math.inf)
        lse[:, :, queries] = (log2_sum * math.log(2)).view(batch, heads, -1)
    v_scale = v.row_scales().repeat_interleave(blocks.group, dim=2)
    if v.block is not None:
        v_scale = v_scale[:, :1]
    return out * v_scale, lse


def uses_linear_exp(head_dim: int) -> bool:
    """Whether the kernel that the table has for this head dim does without exponentials."""
    rows = (row for row in tile_configs("forward_fp8") if row["head_dim"] >= head_dim)
    return bool(next(rows, {"linear_exp": False})["linear_exp"])


def _probabilities(exponents: Tensor, linear: bool) -> tuple[Tensor, Tensor]:
    """P as the row sums count it, and as V is multiplied by it."""
    if linear:
        bits = ((exponents + LINEAR_BIAS) * 8).clamp(0, 126).round().nan_to_num()
        p = bits.to(torch.uint8).view(torch.float8_e4m3fn).float()
        p = torch.where(exponents.isnan(), exponents, p)
        return p, p
    p = torch.exp2(exponents)
    return p, p.to(torch.float8_e4m3fn).float()


def _quantize_rows_fake(
    x: Tensor, shift: Tensor | None, incoherent: bool, seed: int, to_int8: bool
) -> tuple[Tensor, Tensor]:
    batch, seqlen, heads, _ = x.shape
    data = x.new_empty(x.shape, dtype=torch.int8 if to_int8 else torch.float8_e4m3fn)
    blocks = (seqlen + ROW_BLOCK - 1) // ROW_BLOCK
    return data, x.new_empty((batch, heads, blocks), dtype=torch.float32)


def _quantize_values_fake(v: Tensor) -> tuple[Tensor, Tensor]:
    batch, seqlen, heads, head_dim = v.shape
    padded = (seqlen + 15) // 16 * 16
    data = v.new_empty((batch, heads, head_dim, padded), dtype=torch.float8_e4m3fn)
    channels = 0 if v.dtype == torch.float8_e4m3fn else head_dim
    return data, v.new_empty((batch, heads, channels), dtype=torch.float32)


def _key_mean_fake(x: Tensor) -> Tensor:
    batch, _, heads, head_dim = x.shape
    return x.new_empty((batch, heads, head_dim), dtype=torch.float32)


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
    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(q.shape, dtype=torch.float16 if out_float16 else torch.bfloat16)
    return out, q.new_empty((batch, heads, seqlen), dtype=torch.float32)


if GPU_BUILT:
    torch.library.register_fake("cute_kernels::quantize_fp8_rows", _quantize_rows_fake)
    torch.library.register_fake("cute_kernels::quantize_fp8_values", _quantize_values_fake)
    torch.library.register_fake("cute_kernels::fp8_key_mean", _key_mean_fake)
    torch.library.register_fake("cute_kernels::flash_attn_fp8_forward", _forward_fake)
