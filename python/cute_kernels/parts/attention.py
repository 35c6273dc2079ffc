"""Attention of queries to a part of their keys, and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_kernels.autograd import Calls, Forward, dense, varlen
from cute_kernels.parts import operators
from cute_kernels.registration import mark_written


class Mask(NamedTuple):
    """Which keys a query sees: query i stands at key position i + diagonal, and sees the keys from
    `left` before it to `right` after it. None is no limit, and for the diagonal seqlen_k -
    seqlen_q."""

    left: int | None = None
    right: int | None = None
    diagonal: int | None = None


class Packed(NamedTuple):
    """Where packed sequences lie, as of `flash_attn_varlen_func`; int32, on q's device."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    diagonal: Tensor | None = None  # (batch,), in place of the mask's
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    @property
    def lengths(self) -> tuple[Tensor | None, ...]:
        return self[:5]


_ALL = Mask()


def attend_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    mask: Mask = _ALL,
    packed: Packed | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output, in q's dtype, and LSE of attention to k and v alone. A query that sees none of them
    gets 0 and -inf.

    Args:
        mask: query i stands at key position i + diagonal: the position of the first query less that
            of the first key. Of packed sequences it has none: `packed` has.
        sinks: (heads,); belong into one of the parts.
    """
    _check_diagonal(mask, packed)
    if packed is None:
        options = (mask.left, mask.right, mask.diagonal, softcap, sm_margin)
        return _forward(dense)(q, k, v, softmax_scale, False, None, False, sinks, *options)
    options = _packed_options(mask, packed, False, softcap, sm_margin)
    return _forward(varlen)(q, k, v, *packed.lengths, softmax_scale, False, sinks, *options)


def part_gradients_(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    mask: Mask = _ALL,
    packed: Packed | None = None,
    *,
    grad_lse: Tensor | None = None,
    add_to_q: bool = False,
    add_to_kv: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor | None:
    """Writes what a part of the keys has in the gradients of q, k and v.

    Args:
        grad_q, grad_k, grad_v: shapes of q, k and v, in float32 (float64 of float64 inputs), the
            last dimension contiguous; on CUDA their addresses and other strides are multiples of 16
            bytes. All of them is written.
        out, lse, grad_out, grad_lse: of attention to all keys, made of all parts.
        add_to_q, add_to_kv: what is there stays, and is added to. For k and v this takes a pass
            over them more.
        sinks: (heads,), or None where their gradient is not wanted.

    Returns:
        The gradient of the sinks, (heads,), which is that of all parts.
    """
    _check_diagonal(mask, packed)
    tensors = (grad_q, grad_k, grad_v, add_to_q, add_to_kv, grad_out, grad_lse, q, k, v, out, lse)
    of_sinks: Tensor
    if packed is None:
        call: tuple[Any, ...] = (softmax_scale, False, deterministic, None, sinks)
        options: tuple[Any, ...] = (mask.left, mask.right, mask.diagonal, softcap, sm_margin)
        of_sinks = operators.dense_gradients(*tensors, *call, *options)
    else:
        call = (*packed.lengths, softmax_scale, False, sinks)
        options = _packed_options(mask, packed, deterministic, softcap, sm_margin)
        of_sinks = operators.varlen_gradients(*tensors, *call, *options)
    mark_written(grad_q, grad_k, grad_v)
    return None if sinks is None else of_sinks.sum(0)


def _forward(calls: Calls) -> Forward:
    return calls.compiled if torch.compiler.is_compiling() else calls.without_gradient


def _packed_options(
    mask: Mask, packed: Packed, deterministic: bool, softcap: float, sm_margin: int
) -> tuple[Any, ...]:
    longest = (packed.max_seqlen_q, packed.max_seqlen_k)
    return *longest, mask.left, mask.right, deterministic, None, softcap, sm_margin


def _check_diagonal(mask: Mask, packed: Packed | None) -> None:
    if not isinstance(mask, Mask):
        raise TypeError(f"mask is {mask!r}, must be a cute_kernels.parts.Mask")
    if packed is not None and not isinstance(packed, Packed):
        raise TypeError(f"packed is {packed!r}, must be a cute_kernels.parts.Packed or None")
    if packed is not None and mask.diagonal is not None:
        raise ValueError(
            f"mask has the diagonal {mask.diagonal}, must have None with packed, whose diagonal "
            "holds one for each sequence"
        )
