"""Attention to parts of the keys, made one."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.cache import operators
from cute_kernels.cache.checks import check_output
from cute_kernels.cache.combine_checks import check_combine
from cute_kernels.checks import explain, refuse_derivatives


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What attention to all keys gives, from its results for disjoint parts of them.

    Names, order and shapes are those of FlashAttention-3's function of this name.

    Args:
        out_partial: (splits, batch, seqlen, heads, head_dim), float32, last dimension contiguous.
        lse_partial: (splits, batch, seqlen, heads), float32, any strides: natural logarithms. A
            part with -inf has no keys: its output is not looked at and may be NaN.
        out: (batch, seqlen, heads, head_dim), where the output is to be; of out_dtype.
        out_dtype: float32, float16 or bfloat16; out's, or out_partial's, if None.

    Returns:
        The output, (batch, seqlen, heads, head_dim), and its LSE, (batch, seqlen, heads) in
        float32: a view of a dense (batch, heads, seqlen). Without keys they are 0 and -inf.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NotImplementedError: a tensor needs a gradient.
    """
    refuse_derivatives("flash_attn_combine", out_partial, lse_partial, out)
    if out is not None and out_dtype is None:
        out_dtype = getattr(out, "dtype", None)
    try:
        result, lse = operators.combine(out_partial, lse_partial, out_dtype)
    except (AttributeError, IndexError):
        explain(check_combine, out_partial, lse_partial, out_dtype)
        raise
    if out is not None:
        check_output(out, result.shape, result)
        result = out.copy_(result)
    return result, lse
