"""The public function, thin: on a GPU a small call is host time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cute_kernels.autograd import (
    forward_in_transform,
    forward_with_gradient,
    forward_without_gradient,
)
from cute_kernels.checks import check_forward, explain, refuse_tangents
from cute_kernels.compat import in_forward_mode, in_transform
from cute_kernels.fp8 import flash_attn_e4m3
from cute_kernels.operators import flash_attn_forward

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_always_deterministic = torch.are_deterministic_algorithms_enabled

# FlashAttention-3's arguments whose feature is not there yet, with the values that ask for nothing.
_LATER: dict[str, tuple[object, ...]] = {
    "qv": (None,),
    "window_size": ((-1, -1), [-1, -1], (None, None)),
    "attention_chunk": (0,),
    "softcap": (0.0,),
    "num_splits": (1, 0),
    "pack_gqa": (None, False),
    "sm_margin": (0,),
}
_NO_DESCALES = (None, None, None)
_LATER_DEFAULTS = tuple(values[0] for values in _LATER.values())


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
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    tile_config: str | None = None,
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
        v: shape, dtype and device of k.
        softmax_scale: finite, greater than 0; ``head_dim ** -0.5`` if None.
        causal: query i sees key j only if ``j <= i + seqlen_k - seqlen_q`` (bottom-right aligned).
        q_descale, k_descale, v_descale: for q, k and v of float8_e4m3fn, what they are to be
            multiplied by: (batch, key heads), float32; 1 if None. Such a call takes head dims that
            are multiples of 16, returns bfloat16 and has no gradient. From 16-bit tensors,
            `flash_attn_fp8_func` loses less.
        qv, window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin: not there yet;
            anything that would change the call raises NotImplementedError.
        deterministic: gradients on CUDA are the same bits from run to run, at some cost; without
            it the order in which the blocks of keys add to q's gradient varies. Implied by
            ``torch.use_deterministic_algorithms(True)``. Has no effect on the output and on the
            CPU, which are always the same bits on one machine and build.
        return_attn_probs: FlashAttention-3's name for ``return_lse``.
        return_lse: also return the LSE.
        tile_config: name of a row of ``cute_kernels.tile_configs("forward")`` to run, instead of
            the automatic choice. On the CPU it is only looked up.

    Returns:
        The output, like q but always contiguous, and if asked for the LSE: (batch, heads,
        seqlen_q), float32 (float64 for float64 inputs), the natural logarithm of the softmax's
        denominator. A query that sees no key gets 0 and -inf. Both have gradients, once; kept for
        them are q, k, v, the output and the LSE.

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: the GPU is not of compute capability 9.0, or the build has no kernel for it.
        NotImplementedError: an argument whose feature is not there yet, a second derivative, or a
            forward-mode one (``torch.func.jvp``, dual tensors).
    """
    later = (
        qv,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        pack_gqa,
        sm_margin,
    )
    if later != _LATER_DEFAULTS:
        _refuse_unless_harmless(later)
    descales = (q_descale, k_descale, v_descale)
    if descales != _NO_DESCALES or getattr(q, "dtype", None) is torch.float8_e4m3fn:
        if tile_config is not None:
            raise ValueError(f"tile_config is {tile_config!r}, must be None for float8_e4m3fn")
        out, lse = flash_attn_e4m3(q, k, v, *descales, softmax_scale, causal)
        return (out, lse) if return_lse or return_attn_probs else out
    try:
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** -0.5
        elif isinstance(softmax_scale, Tensor) and softmax_scale.requires_grad:
            raise TypeError("softmax_scale is a tensor that requires a gradient, must be a number")
        needs_grad = _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    except (AttributeError, IndexError, ZeroDivisionError) as error:
        explain(error, check_forward, q, k, v, 1.0, causal, tile_config)
    forward: Callable[..., tuple[Tensor, Tensor]]
    if in_transform():
        forward = forward_in_transform
    else:
        if in_forward_mode():
            refuse_tangents(q, k, v)
        if _is_compiling():
            forward = flash_attn_forward
        else:
            forward = forward_with_gradient if needs_grad else forward_without_gradient
    deterministic = deterministic or _always_deterministic()
    out, lse = forward(q, k, v, softmax_scale, causal, tile_config, deterministic)
    return (out, lse) if return_lse or return_attn_probs else out


def _refuse_unless_harmless(later: tuple[object, ...]) -> None:
    for (name, harmless), value in zip(_LATER.items(), later, strict=True):
        if isinstance(value, Tensor) or value not in harmless:
            raise NotImplementedError(f"flash_attn_func: {name} is not there yet")
