"""FP8 attention from tensors of any float dtype or from quantised ones, on the CPU or a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cute_kernels.checks import check_softmax_scale, check_tile_config, refuse_derivatives
from cute_kernels.fp8 import reference
from cute_kernels.fp8.checks import (
    check_device,
    check_flag,
    check_quantised,
    check_tensor,
)
from cute_kernels.fp8.kernels import GPU_BUILT, attention_cuda, whole_attention_cuda
from cute_kernels.fp8.quantize import SATURATION, quantize_fp8
from cute_kernels.fp8.rotation import rotate
from cute_kernels.fp8.tensor import FP8Tensor

# What flash_attn_fp8_func makes of Q and K: int8's error is half of e4m3's after incoherent
# processing, at a few percent of speed (docs/fp8.md).
QK_DTYPE = torch.int8

_LSE_CHUNK = 1 << 23  # elements of q that are in float32 at a time


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
    tile_config: str | None = None,
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
        tile_config: name of a row of ``cute_kernels.tile_configs("forward_fp8")`` to run, instead
            of the automatic choice; 16-bit tensors are then quantised by calls of their own. On the
            CPU it is only looked up.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NotImplementedError: a derivative is asked for, or a tensor is on a GPU and the build has no
            FP8 kernels.
        RuntimeError: the GPU is not of compute capability 9.0.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, allows_quantised=True)
    check_flag("causal", causal)
    if out_dtype is None:
        out_dtype = torch.bfloat16 if isinstance(q, FP8Tensor) else q.dtype
    if out_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"out_dtype is {out_dtype}, must be float16, bfloat16 or float32")
    elements = [x.data if isinstance(x, FP8Tensor) else x for x in (q, k, v)]
    for name, x in zip("kv", elements[1:], strict=True):
        check_device(name, x, elements[0])
    device = elements[0].device
    if device.type == "cuda":
        _check_built(device)
    if device.type == "cuda" and out_dtype == torch.float32:
        raise TypeError("out_dtype is torch.float32, must be float16 or bfloat16 on CUDA")
    refuse_derivatives("flash_attn_fp8_func", q, k, v, where=" in FP8")
    if softmax_scale is None:
        has_head_dim = len(q.shape) == 4 and q.shape[3] > 0
        softmax_scale = q.shape[3] ** -0.5 if has_head_dim else 1.0
    check_softmax_scale(softmax_scale)
    whole = None
    plain = tile_config is None
    if plain and isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        whole = whole_attention_cuda(
            q, k, v, softmax_scale, causal, smooth_k, incoherent, seed, qk_dtype, out_dtype
        )
    if whole is not None:
        out, lse, shift = whole
    else:
        q8, k8, v8 = _quantised(q, k, v, incoherent, seed, smooth_k, qk_dtype)
        out, lse = _attention_quantised(q8, k8, v8, softmax_scale, causal, out_dtype, tile_config)
        shift = k8.shift
    if return_lse and shift is not None:
        lse = lse + _lse_of_shift(q, shift, softmax_scale)
    return (out, lse) if return_lse else out


def _quantised(
    q: Tensor | FP8Tensor,
    k: Tensor | FP8Tensor,
    v: Tensor | FP8Tensor,
    incoherent: bool,
    seed: int,
    smooth_k: bool,
    qk_dtype: torch.dtype,
) -> tuple[FP8Tensor, FP8Tensor, FP8Tensor]:
    """What is not quantised yet, too; k as q is."""
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
    return q, k, v


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
        check_tensor(name, x)
        if x.dtype != torch.float8_e4m3fn:
            why = "with descales" if name == "q" else "like q"
            raise TypeError(f"{name} has dtype {x.dtype}, must be torch.float8_e4m3fn {why}")
        check_device(name, x, q)
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must have 4 dimensions")
    refuse_derivatives("flash_attn_func", q, k, v, where=" in FP8")
    check_flag("causal", causal)
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
        if repeats != 1:
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


def _attention_quantised(
    q: FP8Tensor,
    k: FP8Tensor,
    v: FP8Tensor,
    softmax_scale: float,
    causal: bool,
    out_dtype: torch.dtype,
    tile_config: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE, checked, on whatever device the tensors are on."""
    check_quantised(q, k, v)
    check_softmax_scale(softmax_scale)
    check_tile_config(tile_config, "forward_fp8", q.data, q.data)
    if k.shape[1] == 0 or q.data.is_meta:
        batch, seqlen, heads, _ = q.shape
        out = q.data.new_zeros(q.shape, dtype=out_dtype)
        return out, q.data.new_full((batch, heads, seqlen), -math.inf, dtype=torch.float32)
    if q.data.is_cuda:
        _check_built(q.data.device)
        return attention_cuda(q, k, v, softmax_scale, causal, out_dtype, tile_config)
    with torch.autocast(q.data.device.type, enabled=False):
        out, lse = reference.attention(q, k, v, softmax_scale, causal)
    return out.to(out_dtype), lse


def _check_built(device: torch.device) -> None:
    if not GPU_BUILT:
        raise NotImplementedError(
            f"q is on {device}, and this build has no FP8 kernels (CUTE_KERNELS_FP8=OFF)"
        )


def _lse_of_shift(q: Tensor | FP8Tensor, shift: Tensor, softmax_scale: float) -> Tensor:
    """What the row that was subtracted from k adds to a query's scores, and so to its LSE."""
    rows = q.data if isinstance(q, FP8Tensor) else q
    scale = None
    if isinstance(q, FP8Tensor):
        scale = q.row_scales().squeeze(-1)
        if q.seed is not None:  # as M is orthogonal
            shift = rotate(shift, q.seed)
    batch, seqlen, heads, head_dim = rows.shape
    shift = shift.repeat_interleave(heads // max(1, shift.shape[1]), dim=1).unsqueeze(1)
    # In float32 a few rows at a time. Compilers fuse the product with the sum.
    count = max(1, seqlen)
    if not torch.compiler.is_compiling():
        count = max(1, _LSE_CHUNK // max(1, batch * heads * head_dim))
    sums = [
        (chunk.float().clamp(-SATURATION, SATURATION) * shift).sum(-1)
        for chunk in torch.split(rows, count, dim=1)
    ]
    products = torch.cat(sums, dim=1)
    if scale is not None:
        products = products * scale
    return softmax_scale * products.transpose(1, 2)
