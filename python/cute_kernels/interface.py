"""The public function, thin: on a GPU a small call is host time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_kernels.arguments import (
    Window,
    check_flags,
    check_hints,
    refuse_for_fp8,
    refuse_with_variant,
    window_of,
)
from cute_kernels.autograd import dense
from cute_kernels.checks import check_forward, check_softcap, explain
from cute_kernels.chunks import check_chunk
from cute_kernels.fp8 import e4m3_operands, flash_attn_e4m3
from cute_kernels.variants.attention import attend
from cute_kernels.variants.block_mask import BlockMask
from cute_kernels.variants.variant import BoundVariant, Variant
from cute_kernels.varlen import flash_attn_varlen_func

_always_deterministic = torch.are_deterministic_algorithms_enabled
_choose = dense.choose
_E4M3 = torch.float8_e4m3fn

# What the arguments are that most calls leave alone.
_USUAL = ((-1, -1), 0, 0.0, 1, None, 0)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    tile_config: str | None = None,
    variant: Variant | BoundVariant | None = None,
    block_mask: BlockMask | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, ``softmax(softmax_scale * q @ k^T) @ v`` for every head.

    Names and order of the arguments are those of FlashAttention-3's function of this name. The
    algorithm is that paper's, arXiv 2407.08608, section 3 and algorithms 1 and 2.

    Args:
        q: (batch, seqlen_q, heads, head_dim). On a GPU of compute capability 9.0 float16 or
            bfloat16, on the CPU also float32 and float64. head_dim is a multiple of 8 up to 256.
            Any strides with a contiguous last dimension, here and in k and v. On CUDA, a tensor
            whose address or strides are not multiples of 16 bytes is copied in full, which a
            UserWarning says once in a process.
        k: (batch, seqlen_k, key heads, head_dim), dtype and device of q. The number of query heads
            is a multiple of that of key heads (MHA, GQA, MQA).
        v: shape, dtype and device of k; its head_dim, which is the output's, may be another
            multiple of 8 up to 256.
        softmax_scale: finite, greater than 0; ``head_dim ** -0.5`` if None.
        causal: query i sees key j only if ``j <= i + seqlen_k - seqlen_q`` (bottom-right aligned).
        window_size: (left, right), two ints as a tuple, list, tensor or array: query i sees key j
            only if ``i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right``, both
            ends included; -1 is no limit. With ``causal`` right is 0.
        q_descale, k_descale, v_descale: for q, k and v of float8_e4m3fn, what they are to be
            multiplied by: (batch, key heads), float32; 1 if None. Such a call takes head dims that
            are multiples of 16, returns bfloat16, has no softcap and no gradient. From 16-bit
            tensors, `flash_attn_fp8_func` loses less.
        softcap: above 0, scores become ``softcap * tanh(score / softcap)`` after softmax_scale and
            before the mask; 0 is none.
        attention_chunk: above 0, a query sees only keys of its own chunk: with its position
            ``p = i + seqlen_k - seqlen_q`` rounded down to a multiple of it as c, query i sees key
            j only if ``c <= j < c + attention_chunk``, and what causal and window_size let it. On
            CUDA q, k and v are copied in full unless batch entries follow one another in memory.
        qv: not there yet, NotImplementedError: `flash_attn_with_kvcache` has it.
        num_splits, pack_gqa: hints, which change no result and so far nothing else.
        sm_margin: how many multiprocessors of a GPU the call, and its gradient, leave alone, for
            communication beside it; one is always left to the call. The short kernels around
            attention itself do not look at it. Changes no result.
        deterministic: gradients on CUDA are the same bits from run to run, at some cost; without
            it the order in which the blocks of keys add to q's gradient varies. Implied by
            ``torch.use_deterministic_algorithms(True)``. Has no effect on the output and on the
            CPU, which are always the same bits on one machine and build.
        return_attn_probs: FlashAttention-3's name for ``return_lse``.
        sinks: (heads,), float32, float16 or bfloat16, of each query head a score that stands in the
            softmax of its rows beside those of the keys, without a value: not multiplied by
            softmax_scale, seen by every query, -inf for none. Has a gradient, of its dtype.
        return_lse: also return the LSE.
        tile_config: name of a row of ``cute_kernels.tile_configs("forward")`` to run, instead of
            the automatic choice. On the CPU it is only looked up.
        variant: a `Variant`, called with the tensors and numbers that it has, or one of
            ``cute_kernels.variants``: other scores, masks or weights.
        block_mask: a `BlockMask`: which blocks of queries and keys are looked at, and in which of
            them the variant's mask is asked.

    Returns:
        The output, like q but always contiguous and with v's head_dim, and if asked for the LSE:
        (batch, heads, seqlen_q), float32 (float64 for float64 inputs), the natural logarithm of the
        softmax's denominator. A query that sees no key gets 0 and -inf, with sinks 0 and its sink.
        Both have gradients, once; kept for them are q, k, v, the sinks, the output and the LSE.

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: the GPU is not of compute capability 9.0, or the build has no kernel for it.
        NotImplementedError: an argument whose feature is not there yet, a second derivative, or a
            forward-mode one (``torch.func.jvp``, dual tensors).
    """
    if type(causal) is not bool or type(deterministic) is not bool:
        check_flags(causal=causal, deterministic=deterministic)
    # By identity: a tensor takes twenty microseconds to say that it does not equal None.
    plain = qv is q_descale is k_descale is v_descale is sinks is None
    plain = plain and variant is None and block_mask is None
    asked = (window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin)
    options: tuple[Any, ...] = ()
    try:
        hinted = asked != _USUAL
    except (ValueError, RuntimeError):  # arrays do not compare to one answer
        hinted = True
    unusual = hinted or not plain or getattr(q, "dtype", None) is _E4M3
    if unusual:
        if qv is not None:
            raise NotImplementedError(
                "flash_attn_func: qv is not there yet: flash_attn_with_kvcache has it"
            )
        check_hints(num_splits, pack_gqa, sm_margin)
        causal, left, right = window_of(window_size, causal)
        check_softcap(softcap)  # of a tensor, the operator would read it, and wait
        check_chunk(attention_chunk)
        options = (sinks, left, right, None, softcap, sm_margin) if hinted else (sinks,)
        descales = (q_descale, k_descale, v_descale)
        if any(x is not None for x in descales) or getattr(q, "dtype", None) is _E4M3:
            if tile_config is not None:
                raise ValueError(f"tile_config is {tile_config!r}, must be None for float8_e4m3fn")
            refuse_for_fp8(
                softcap=softcap > 0,
                variant=variant is not None,
                block_mask=block_mask is not None,
            )
            mask, with_lse = (causal, left, right), return_lse or return_attn_probs
            operands = e4m3_operands(q, k, v, *descales, sinks)
            if attention_chunk == 0:
                of_call = (softmax_scale, mask, sinks, with_lse, sm_margin)
                out, lse = flash_attn_e4m3(operands, *of_call)
            else:
                out, lse = _attend_in_chunks(
                    q,
                    k,
                    v,
                    q_descale=q_descale,
                    k_descale=k_descale,
                    v_descale=v_descale,
                    softmax_scale=softmax_scale,
                    causal=causal,
                    window_size=window_size,
                    attention_chunk=attention_chunk,
                    sm_margin=sm_margin,
                    sinks=sinks,
                )
            return (out, lse) if return_lse or return_attn_probs else out
        if variant is not None or block_mask is not None:
            refuse_with_variant(softcap=softcap > 0, attention_chunk=attention_chunk > 0)
            deterministic = _always_deterministic() or deterministic
            call = (q, k, v, None, softmax_scale, causal, sinks, left, right)
            of_kernels = (deterministic, tile_config, sm_margin)
            out, lse = attend(variant, *call, *of_kernels, block_mask)
            return (out, lse) if return_lse or return_attn_probs else out
        if attention_chunk > 0:
            check_forward(q, k, v, 1.0, causal, None, deterministic, *options)
            out, lse = _attend_in_chunks(
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                attention_chunk=attention_chunk,
                softcap=softcap,
                deterministic=deterministic,
                sm_margin=sm_margin,
                sinks=sinks,
                tile_config=tile_config,
            )
            return (out, lse) if return_lse or return_attn_probs else out
    try:
        forward, softmax_scale = _choose(q, k, v, softmax_scale, sinks)
    except (AttributeError, IndexError, ZeroDivisionError, RuntimeError):
        explain(check_forward, q, k, v, 1.0, causal, tile_config, False, *options)
        raise
    inputs = (q, k, v, softmax_scale, causal, tile_config, _always_deterministic() or deterministic)
    out, lse = forward(*inputs, *options)
    return (out, lse) if return_lse or return_attn_probs else out


def _attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """As packed sequences: output and LSE of a call that is checked."""
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    of_entries = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out, lse = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        of_entries * seqlen_q,
        of_entries * seqlen_k,
        seqlen_q,
        seqlen_k,
        **arguments,
        return_lse=True,
    )
    lse = lse.reshape(heads, batch, seqlen_q).transpose(0, 1).contiguous()
    return out.reshape(batch, seqlen_q, heads, v.shape[-1]), lse
