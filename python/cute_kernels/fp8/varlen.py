"""FP8 attention of sequences that lie one behind the other, on the CPU or a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_kernels.arguments import Window, window_of
from cute_kernels.checks import check_softmax_scale, refuse_derivatives
from cute_kernels.chunks import Lengths, check_chunk, in_chunks
from cute_kernels.fp8 import packed
from cute_kernels.fp8.attention import QK_DTYPE, Mask, check_e4m3, output_dtype, scales_of
from cute_kernels.fp8.checks import (
    PACKED_ORDER,
    check_device,
    check_quantisation,
    check_rank,
    check_tensor,
)
from cute_kernels.fp8.kernels import GPU_BUILT, varlen_attention, varlen_attention_e4m3
from cute_kernels.fp8.tensor import Quantisation
from cute_kernels.fp8.varlen_checks import (
    check_varlen_forward,
    check_varlen_values,
    check_varlen_whole,
)
from cute_kernels.operators import packed_sequences
from cute_kernels.reference import without_autocast
from cute_kernels.varlen_checks import check_contents, check_lengths, check_max_seqlens

Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # cu_seqlens and seqused


def flash_attn_fp8_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    sinks: Tensor | None = None,
    incoherent: bool = True,
    seed: int = 0,
    smooth_k: bool = True,
    qk_dtype: torch.dtype = QK_DTYPE,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    tile_config: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_fp8_func` of each of several packed sequences, quantised one by one.

    Args:
        q: (total_q, heads, head_dim), k: (total_k, key heads, head_dim), v: (total_k, key heads,
            v's head_dim): float16 or bfloat16, on the CPU also float32 and float64; head dims are
            multiples of 16 up to 256.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k: as of
            `flash_attn_varlen_func`.
        softmax_scale, causal, window_size, attention_chunk, sinks: likewise.
        incoherent, seed, smooth_k, qk_dtype, out_dtype: as of `flash_attn_fp8_func`.
        return_lse: also return the LSE.
        tile_config: name of a row of ``cute_kernels.tile_configs("forward_fp8")`` with any_call, to
            run instead of the automatic choice. On the CPU it is only looked up.

    Returns:
        The output, (total_q, heads, v's head_dim), and if asked for the LSE, (heads, total_q),
        float32. A query that sees no key and a row of q that no sequence uses get 0 and -inf; with
        sinks the former has its sink as its LSE.

    Raises:
        ValueError, TypeError: an argument is not as described. What cu_seqlens and seqused hold is
            looked at on the CPU only.
        NotImplementedError: a derivative is asked for, or a tensor is on a GPU and the build has no
            FP8 kernels.
        RuntimeError: the GPU is not of compute capability 9.0.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        check_rank(name, x, 3, PACKED_ORDER)
        check_device(name, x, q)
    causal, left, right = window_of(window_size, causal)
    out_dtype = output_dtype(q, out_dtype)
    refuse_derivatives("flash_attn_fp8_varlen_func", q, k, v, sinks, where=" in FP8")
    flags = {"incoherent": incoherent, "smooth_k": smooth_k}
    check_quantisation(None, seed, qk_dtype, of_dtype="qk_dtype", **flags)
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5 if q.shape[2] else 1.0
    check_softmax_scale(softmax_scale)
    given = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    lengths = _lengths(q, k, given, (max_seqlen_q, max_seqlen_k), attention_chunk)
    how = Quantisation(incoherent, seed, smooth_k, qk_dtype)
    options: dict[str, Any] = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "window_left": left,
        "window_right": right,
        "tile_config": tile_config,
    }
    attend = varlen_attention
    if not GPU_BUILT or out_dtype == torch.float32:
        attend = _attention_by_operations
    of_call = (softmax_scale, causal, how, out_dtype, return_lse, sinks)
    out, lse = attend(q, k, v, lengths, *of_call, **options)
    return (out, lse) if return_lse else out


def _attention_by_operations(
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
    """`varlen_attention` without the operator, which a build may lack, in any dtype."""
    kinds = (how.smooth_k, how.incoherent, how.seed, how.qk_dtype == torch.int8, False)
    inputs = (q, k, v, *lengths, softmax_scale, causal, *kinds, with_lse, sinks)
    check_varlen_whole(*inputs, **options)
    sequences, mask = packed_sequences(q, k, lengths, causal, **options)
    with without_autocast(q):
        return packed.attention_of_sequences(
            q, k, v, sequences, softmax_scale, mask, how, sinks, out_dtype, with_lse
        )


def flash_attn_varlen_e4m3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Given,
    longest: tuple[int | None, int | None],
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    softmax_scale: float | None,
    mask: Mask,
    attention_chunk: int,
    sinks: Tensor | None,
    with_lse: bool,
    sm_margin: int,
) -> tuple[Tensor, Tensor]:
    """Output, in bfloat16, and LSE, exact only `with_lse`, of e4m3 tensors with a number for each
    sequence and key head, as FlashAttention-3's function of the same arguments. `given`: its
    cu_seqlens and seqused."""
    check_e4m3("flash_attn_varlen_func", q, k, v, 3, sinks, descales)
    causal, left, right = mask
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5 if q.shape[2] else 1.0
    check_softmax_scale(softmax_scale)
    check_lengths(q, *given, None)
    lengths = _lengths(q, k, given, longest, attention_chunk)
    batch, sequences = given[0].shape[0] - 1, lengths[0].shape[0] - 1
    scales = scales_of(q.shape[1], k, batch, *descales)
    if sequences != batch:
        of_q, of_k, of_v = (x.repeat_interleave(sequences // batch, dim=0) for x in scales)
        scales = of_q, of_k, of_v
    options: dict[str, Any] = {
        "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1],
        "window_left": left,
        "window_right": right,
        "with_lse": with_lse,
    }
    if GPU_BUILT:
        of_call = (softmax_scale, causal, sinks)
        options["sm_margin"] = sm_margin
        return varlen_attention_e4m3(q, k, v, scales, lengths, *of_call, **options)
    check_varlen_values(v, lengths[1], lengths[3])
    of_each, of_mask = packed_sequences(q, k, lengths, causal, **options)
    data, _ = packed.values_of_sequences(v, [one.keys for one in of_each])
    inputs = (q, k, data, *scales, *lengths, softmax_scale, causal, False, sinks)
    check_varlen_forward(*inputs, **options)
    with without_autocast(q):
        return packed.attention_of_quantised(
            q, k, data, scales, of_each, softmax_scale, of_mask, sinks, torch.bfloat16
        )


def _lengths(
    q: Tensor,
    k: Tensor,
    given: Given,
    longest: tuple[int | None, int | None],
    attention_chunk: int,
) -> Lengths:
    """Those of the operators, whose sequences may be chunks."""
    check_chunk(attention_chunk)
    check_max_seqlens(*longest)
    check_lengths(q, *given, None)
    if not q.is_cuda and not torch.compiler.is_compiling() and type(given[0]) is Tensor:
        # Here, by the names that the caller gave: operators have chunks, and V's sequences.
        check_contents(q, k, *given, *longest)
    if attention_chunk == 0:
        return (*given, None)
    return in_chunks(attention_chunk, k.shape[0], longest[1], *given)
