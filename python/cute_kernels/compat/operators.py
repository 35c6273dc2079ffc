"""What FlashAttention-2 and 3 have in common below their public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_kernels.arguments import window_of
from cute_kernels.checks import check_tensor
from cute_kernels.fp8.checks import DENSE_ORDER, check_rank
from cute_kernels.operators import flash_attn_backward, flash_attn_varlen_backward


class Sequences(NamedTuple):
    """Lengths of packed sequences, as of `flash_attn_varlen_func`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    @classmethod
    def of_batch(
        cls, q: Tensor, k: Tensor, seqused_q: Tensor | None, seqused_k: Tensor | None
    ) -> Sequences:
        """Of tensors (batch, seqlen, heads, head_dim), once they are flattened."""
        for name, x in (("q", q), ("k", k)):
            check_rank(name, x, 4, DENSE_ORDER)
        starts_q, starts_k = (
            torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
            for x in (q, k)
        )
        return cls(starts_q, starts_k, seqused_q, seqused_k, q.shape[1], k.shape[1])


def rows_contiguous(*values: Any) -> tuple[Any, ...]:
    """The tensors, copied where the last dimension is not contiguous: FlashAttention takes them."""
    return tuple(
        x.contiguous()
        if isinstance(x, Tensor) and x.dim() > 0 and x.stride(-1) != 1 and x.shape[-1] != 1
        else x
        for x in values
    )


def longest(max_seqlen: Any) -> Any:
    """FlashAttention also takes a tensor, which it waits for. It need not be known here."""
    return None if isinstance(max_seqlen, Tensor) else max_seqlen


class _WithoutGradient(torch.autograd.Function):
    """A result that has none: an error when it is asked for."""

    @staticmethod
    def forward(ctx: Any, reason: str, result: Tensor, *_: Tensor) -> Tensor:
        ctx.reason = reason
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(ctx.reason)


_told_of: Callable[..., Tensor] = _WithoutGradient.apply


def without_gradient(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """What it returns, though tensors need a gradient: FlashAttention attends to caches, and in
    FP8, all the same. Here what is lost is told of, in the backward pass."""
    given = (*inputs, *options.values())
    needing = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    if not needing or not torch.is_grad_enabled():
        return function(*inputs, **options)
    with torch.no_grad():
        results = function(*inputs, **options)
    reason = f"{function.__name__} has no gradient of a call with a cache or in FP8"
    if isinstance(results, tuple):
        return tuple(_told_of(reason, result, *needing) for result in results)
    return _told_of(reason, results, *needing)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    sequences: Sequences | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
) -> None:
    """Writes the gradients of q, k and v into `grads`, from an output and an LSE that may be those
    of more keys than k has.

    Args:
        sequences: of packed tensors, or what `Sequences.of_batch` gives for these.

    Raises:
        ValueError: one of `grads` is None, or not of the shape of its tensor.
    """
    of_forward = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse}
    for name, tensor in of_forward.items():
        check_tensor(name, tensor)
    for name, grad, x in zip(("dq", "dk", "dv"), grads, (q, k, v), strict=True):
        if grad is None:
            raise ValueError(f"{name} is None, must be a tensor that the gradient is written to")
        check_tensor(name, grad)
        if grad.shape != x.shape:
            raise ValueError(
                f"{name} has shape {tuple(grad.shape)}, must be {tuple(x.shape)} like {name[1]}"
            )
    dout, q, k, v, out = rows_contiguous(dout, q, k, v, out)
    if sequences is not None and q.dim() == 4:
        dout, q, k, v, out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
        softmax_lse = softmax_lse.transpose(0, 1).flatten(1)
    causal, left, right = window_of(window_size, causal)
    tensors = (dout, None, q, k, v, out, softmax_lse.contiguous())
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = {"window_left": left, "window_right": right, "softcap": softcap}
    if sequences is None:
        results = flash_attn_backward(*tensors, scale, causal, deterministic, **options)
    else:
        *lengths, max_seqlen_q, max_seqlen_k = sequences
        results = flash_attn_varlen_backward(
            *tensors,
            *lengths,
            None,
            scale,
            causal,
            max_seqlen_q=longest(max_seqlen_q),
            max_seqlen_k=longest(max_seqlen_k),
            deterministic=deterministic,
            **options,
        )
    for grad, result in zip(grads, results[:3], strict=True):
        assert grad is not None
        grad.copy_(result.view(grad.shape))
