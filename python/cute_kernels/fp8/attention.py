"""FP8 attention from tensors of any float dtype or from quantised ones, on the CPU or a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cute_kernels.arguments import Window, window_of
from cute_kernels.checks import (
    check_sinks,
    check_softmax_scale,
    refuse_derivatives,
)
from cute_kernels.fp8 import reference
from cute_kernels.fp8.checks import (
    DENSE_ORDER,
    check_device,
    check_input,
    check_quantisation,
    check_quantised,
    check_rank,
    check_shapes,
    check_tensor,
)
from cute_kernels.fp8.kernels import GPU_BUILT, attention_cuda, whole_attention_cuda
from cute_kernels.fp8.quantize import quantize_fp8
from cute_kernels.fp8.tensor import FP8Tensor
from cute_kernels.reference import mask_of, without_autocast
from cute_kernels.tile_checks import check_tile_config, is_own_mask

# What flash_attn_fp8_func makes of Q and K: int8's error is half of e4m3's after incoherent
# processing, at a few percent of speed (docs/fp8.md).
QK_DTYPE = torch.int8

Mask = tuple[bool, int | None, int | None]  # causal, window_left, window_right


def flash_attn_fp8_func(
    q: Tensor | FP8Tensor,
    k: Tensor | FP8Tensor,
    v: Tensor | FP8Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    window_size: Window = (-1, -1),
    sinks: Tensor | None = None,
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
        q, k, v: (batch, seqlen, heads, head_dim) as in `flash_attn_func`, head dims multiples of 16
            up to 256, or the results of `quantize_fp8`: q and k with the same seed and dtype, v
            without incoherent processing.
        softmax_scale: finite, greater than 0; ``head_dim ** -0.5`` if None.
        causal: query i sees key j only if ``j <= i + seqlen_k - seqlen_q``.
        window_size, sinks: as of `flash_attn_func`, without a gradient.
        incoherent, seed, smooth_k, qk_dtype: of the quantisation of q and k that come as they are;
            see `quantize_fp8`.
        out_dtype: float16 or bfloat16 (float32 on the CPU); q's dtype if None, bfloat16 if q comes
            quantised.
        return_lse: also return the natural logarithm of the softmax's denominator, (batch, heads,
            seqlen_q), float32: to 1e-3 that of the quantised tensors, where Q and K are int8 (at
            head dim 256 to 0.01, if scores are 10 times those of N(0, 1) or more). Takes some time
            up to head dim 128, where kernels do without exponentials otherwise.
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
    mask = window_of(window_size, causal)
    elements = [x.data if isinstance(x, FP8Tensor) else x for x in (q, k, v)]
    for name, x in zip("kv", elements[1:], strict=True):
        check_device(name, x, elements[0])
    if out_dtype is None and isinstance(q, FP8Tensor):
        out_dtype = torch.bfloat16
    out_dtype = output_dtype(elements[0], out_dtype)
    refuse_derivatives("flash_attn_fp8_func", q, k, v, sinks, where=" in FP8")
    flags = {"incoherent": incoherent, "smooth_k": smooth_k}
    check_quantisation(None, seed, qk_dtype, of_dtype="qk_dtype", **flags)
    if sinks is not None:
        check_sinks(sinks, elements[0])
    if softmax_scale is None:
        has_head_dim = len(q.shape) == 4 and q.shape[3] > 0
        softmax_scale = q.shape[3] ** -0.5 if has_head_dim else 1.0
    check_softmax_scale(softmax_scale)
    plain = tile_config is None
    if plain and isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        how = smooth_k, incoherent, seed, qk_dtype
        variant = return_lse, sinks, mask[1], mask[2]
        whole = whole_attention_cuda(q, k, v, softmax_scale, mask[0], *how, out_dtype, *variant)
        if whole is not None:
            return whole[:2] if return_lse else whole[0]
    q8, k8, v8 = _quantised(q, k, v, incoherent, seed, smooth_k, qk_dtype)
    offset = None
    if k8.shift is not None and (return_lse or sinks is not None):
        offset = reference.score_offset(q, k8.shift, softmax_scale)
    of_sinks = None if sinks is None else offset
    of_call = (softmax_scale, mask, out_dtype, tile_config, sinks, of_sinks, return_lse)
    out, lse = _attention_quantised(q8, k8, v8, *of_call)
    if offset is not None and of_sinks is None:
        lse = lse + offset
    return (out, lse) if return_lse else out


def output_dtype(q: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """The output's, of an argument and a q that is not quantised; checked, with the device."""
    allowed = (torch.float16, torch.bfloat16, torch.float32)
    if out_dtype is None:
        out_dtype = q.dtype
        if out_dtype not in allowed:
            names = "float16, bfloat16 or float32"
            raise TypeError(f"q has dtype {q.dtype}, must be {names} where out_dtype is None")
    if out_dtype not in allowed:
        raise TypeError(f"out_dtype is {out_dtype}, must be float16, bfloat16 or float32")
    if q.device.type == "cuda":
        _check_built(q.device)
        if out_dtype == torch.float32:
            raise TypeError("out_dtype is torch.float32, must be float16 or bfloat16 on CUDA")
    return out_dtype


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
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, FP8Tensor):
            check_rank(name, x.data, 4, DENSE_ORDER)
        else:
            check_input(name, x)
    check_shapes(q, k, v)
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


Operands = tuple[FP8Tensor, FP8Tensor, FP8Tensor]


def e4m3_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    sinks: Tensor | None,
) -> Operands:
    """e4m3 tensors with a number for each key head, as FlashAttention-3's function has them;
    checked, with the call's sinks."""
    descales = (q_descale, k_descale, v_descale)
    check_e4m3("flash_attn_func", q, k, v, 4, sinks, descales)
    scales = scales_of(q.shape[2], k, k.shape[0], *descales)
    of_q, of_k, of_v = (
        FP8Tensor(x, scale[:, :, : x.shape[1]], max(1, x.shape[1]))
        for x, scale in zip((q, k, v), scales, strict=True)
    )
    check_quantised(of_q, of_k, of_v)
    return of_q, of_k, of_v


def flash_attn_e4m3(
    operands: Operands,
    softmax_scale: float | None,
    mask: Mask,
    sinks: Tensor | None,
    with_lse: bool,
    sm_margin: int,
) -> tuple[Tensor, Tensor]:
    """Their output, in bfloat16, and LSE, which is exact only `with_lse`."""
    if softmax_scale is None:
        softmax_scale = operands[0].shape[3] ** -0.5
    of_call = (softmax_scale, mask, torch.bfloat16)
    variant: dict[str, Any] = {"sinks": sinks, "with_lse": with_lse, "sm_margin": sm_margin}
    return _attention_quantised(*operands, *of_call, **variant)


def check_e4m3(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: int,
    sinks: Tensor | None,
    descales: tuple[Tensor | None, ...],
) -> None:
    """What calls of e4m3 tensors of every layout have in common."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dtype != torch.float8_e4m3fn:
            why = "with descales" if name == "q" else "like q"
            raise TypeError(f"{name} has dtype {x.dtype}, must be torch.float8_e4m3fn {why}")
        check_device(name, x, q)
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must have {rank} dimensions")
    if q.device.type == "cuda":
        _check_built(q.device)
    refuse_derivatives(function, q, k, v, sinks, *descales, where=" in FP8")
    if sinks is not None:
        check_sinks(sinks, q)


def scales_of(
    heads: int, k: Tensor, batch: int, *descales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, (batch, heads, 1), of k and of v, (batch, key heads, 1), from descales."""
    key_heads = k.shape[-2]
    pairs = (batch, key_heads)

    def scale_of(name: str, descale: Tensor | None) -> Tensor:
        if descale is None:
            return torch.ones((1, 1, 1), dtype=torch.float32, device=k.device).expand(*pairs, 1)
        check_tensor(name, descale)
        if tuple(descale.shape) != pairs:
            raise ValueError(
                f"{name} has shape {tuple(descale.shape)}, must be (batch, key heads) = {pairs}"
            )
        if descale.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {descale.dtype}, must be torch.float32")
        if descale.device != k.device:
            raise ValueError(f"{name} is on {descale.device}, must be on {k.device} like q")
        return descale.unsqueeze(2)

    names = ("q_descale", "k_descale", "v_descale")
    of_q, of_k, of_v = (scale_of(*pair) for pair in zip(names, descales, strict=True))
    group = heads // key_heads if key_heads else 1
    return of_q if group == 1 else of_q.repeat_interleave(group, dim=1), of_k, of_v


def _attention_quantised(
    q: FP8Tensor,
    k: FP8Tensor,
    v: FP8Tensor,
    softmax_scale: float,
    mask: Mask,
    out_dtype: torch.dtype,
    tile_config: str | None = None,
    sinks: Tensor | None = None,
    score_offset: Tensor | None = None,
    with_lse: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output and LSE, checked, on whatever device the tensors are on."""
    check_quantised(q, k, v)
    check_softmax_scale(softmax_scale)
    causal, left, right = mask
    any_call = sinks is not None or is_own_mask(q.data, k.data, left, 0 if causal else right, None)
    of_v = v.data.new_empty((0, v.shape[3]))
    check_tile_config(tile_config, "forward_fp8", q.data, of_v, any_call)
    batch, seqlen, heads, _ = q.shape
    if k.shape[1] == 0 or q.data.is_meta:
        out = q.data.new_zeros((batch, seqlen, heads, v.shape[3]), dtype=out_dtype)
        lse = q.data.new_full((batch, heads, seqlen), -math.inf, dtype=torch.float32)
        return out, lse if sinks is None else lse.copy_(sinks[:, None])
    if q.data.is_cuda:
        _check_built(q.data.device)
        variant = (sinks, score_offset, with_lse, left, right, sm_margin)
        return attention_cuda(q, k, v, softmax_scale, causal, out_dtype, tile_config, *variant)
    with without_autocast(q.data):
        of_mask = mask_of(causal, left, right)
        out, lse = reference.attention(q, k, v, softmax_scale, of_mask, sinks, score_offset)
    return out.to(out_dtype), lse


def _check_built(device: torch.device) -> None:
    if not GPU_BUILT:
        raise NotImplementedError(
            f"q is on {device}, and this build has no FP8 kernels (CUTE_KERNELS_FP8=OFF)"
        )
