"""FP8 attention from tensors of any float dtype or from quantised ones, on the CPU or a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import check_softmax_scale
from cute_kernels.fp8 import reference
from cute_kernels.fp8.kernels import GPU_BUILT, attention_cuda, whole_attention_cuda
from cute_kernels.fp8.quantize import SATURATION, quantize_fp8
from cute_kernels.fp8.tensor import FP8Tensor, check_head_dim

# What flash_attn_fp8_func makes of Q and K: int8's error is half of e4m3's after incoherent
# processing, at a few percent of speed (docs/fp8.md).
QK_DTYPE = torch.int8


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
    if softmax_scale is None:
        has_head_dim = len(q.shape) == 4 and q.shape[3] > 0
        softmax_scale = q.shape[3] ** -0.5 if has_head_dim else 1.0
    check_softmax_scale(softmax_scale)
    whole = None
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        whole = whole_attention_cuda(
            q, k, v, softmax_scale, causal, smooth_k, incoherent, seed, qk_dtype, out_dtype
        )
    if whole is not None:
        out, lse, shift = whole
    else:
        q8, k8, v8 = _quantised(q, k, v, incoherent, seed, smooth_k, qk_dtype)
        out, lse = _attention_quantised(q8, k8, v8, softmax_scale, causal, out_dtype)
        shift = k8.shift
    if return_lse and shift is not None:
        with torch.autocast(device.type, enabled=False):
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
    check_softmax_scale(softmax_scale)
    if q.data.is_cuda:
        _check_built(q.data.device)
        return attention_cuda(q, k, v, softmax_scale, causal, out_dtype)
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
    rows = q.dequantize() if isinstance(q, FP8Tensor) else q.float()
    rows = rows.clamp(-SATURATION, SATURATION)
    shift = shift.repeat_interleave(rows.shape[2] // max(1, shift.shape[1]), dim=1)
    return softmax_scale * (rows * shift.unsqueeze(1)).sum(-1).transpose(1, 2)


def _check_call(q: FP8Tensor, k: FP8Tensor, v: FP8Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.data.shape)}, must have 4 dimensions")
        batch, seqlen, heads, head_dim = x.shape
        check_head_dim(name, head_dim)
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
