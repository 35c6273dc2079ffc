"""The variants' operators on CUDA: shape inference and gradients. docs/variants.md has the rules of
captured tensors' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cute_kernels import reference
from cute_kernels.compile.hooks import KNOWN
from cute_kernels.compile.hooks import Tensor as Declared
from cute_kernels.operators import NAMESPACE
from cute_kernels.tiles import ROWS

_operators = getattr(torch.ops, NAMESPACE)
variant_forward = _operators.flash_attn_variant_forward.default
variant_backward = _operators.flash_attn_variant_backward.default

_LENGTHS = 4  # inputs of forward that say where packed sequences lie
_OF_HEADS, _OF_SCORES = 1, 2  # Gradient of attention/variant/arguments.hpp
_WARPS = 8  # of a key block, which each add to a gradient of heads


def _kind(declared: Declared) -> int:
    return _OF_HEADS if declared.is_of_rows else _OF_SCORES


def _forward_fake(q: Tensor, _: Tensor, v: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
    return reference.empty_outputs(q, v)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    captured: Sequence[Tensor],
    _block_lists: Sequence[Tensor],
    _numbers: Sequence[float],
    _variant: str | None,
    tile_config: str | None,
    gradient_kinds: Sequence[int],
    softmax_scale: float,
    causal: bool,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    tile_n = ROWS["backward"][str(tile_config)]["tile_n"]
    if cu_seqlens_k is None:
        batch, blocks = q.shape[0], (k.shape[1] + tile_n - 1) // tile_n
    else:
        batch, blocks = 1, k.shape[0] // tile_n + cu_seqlens_k.shape[0]
    shapes = {
        _OF_HEADS: (batch, q.shape[-2], blocks, _WARPS),
        _OF_SCORES: (batch, q.shape[-2], q.shape[-3], k.shape[-3]),
    }
    of_captured = [q.new_empty(shapes[kind], dtype=torch.float32) for kind in gradient_kinds]
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    return grad_q, grad_k, grad_v, reference.empty_sinks_gradient(q, sinks), of_captured


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, used_q, used_k, captured, block_lists, *options = inputs
    numbers, variant, _, backward, gradients_of, scale, causal, sinks, *rest = options
    ctx.options = (numbers, variant, backward, scale, causal, rest)
    ctx.gradients_of = list(gradients_of)
    ctx.captured = len(captured)
    inputs = (q, k, v, *output, cu_q, cu_k, used_q, used_k, sinks)
    ctx.save_for_backward(*inputs, *captured, *block_lists)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # which checkpointing gives once
    q, k, v, out, lse, *lengths, sinks = saved[:10]
    end = 10 + ctx.captured
    captured, block_lists = list(saved[10:end]), list(saved[end:])
    numbers, variant, backward, scale, causal, rest = ctx.options
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    declared = [KNOWN[variant].tensors[i] for i in ctx.gradients_of]
    *of_qkv, of_sinks, parts = variant_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        *lengths,
        captured,
        block_lists,
        numbers,
        variant,
        backward,
        [_kind(tensor) for tensor in declared],
        scale,
        causal,
        sinks,
        *rest,
    )
    of_captured: list[Tensor | None] = [None] * len(captured)
    for i, tensor, part in zip(ctx.gradients_of, declared, parts, strict=True):
        of_captured[i] = _gathered(tensor, captured[i], part)
    of_sinks = None if sinks is None else of_sinks.sum(0).to(sinks.dtype)
    # PyTorch takes an empty list for one of tensors, and wants it back.
    empty: list[Tensor] = []
    of_lists: list[None] = [None] * len(block_lists)
    of_numbers, of_indices = (None if x else empty for x in (numbers, ctx.gradients_of))
    options = (of_lists, of_numbers, None, None, None, of_indices, None, None, of_sinks)
    return *of_qkv, *[None] * _LENGTHS, of_captured, *options, *[None] * len(rest)


def _gathered(declared: Declared, tensor: Tensor, part: Tensor) -> Tensor:
    """The gradient of a captured tensor, from what the kernel has of it: sums over what it has no
    axis for, always in one order."""
    dims = ["batch", "head"] if declared.is_of_rows else ["batch", "head", "query", "key"]
    if declared.is_of_rows:
        part = part.sum((2, 3))
    summed = [i for i, dim in enumerate(dims) if dim not in declared.axes]
    if summed:
        part = part.sum(summed)
    left = [dim for dim in dims if dim in declared.axes]
    part = part.permute([left.index(str(axis)) for axis in declared.axes])
    gradient = torch.zeros_like(tensor, dtype=torch.float32)
    gradient[tuple(slice(0, size) for size in part.shape)] = part
    return gradient.to(tensor.dtype)


def _second_derivative(*_: Any) -> None:
    raise NotImplementedError("attention with a variant has no second derivative")


for _operator, _fake, _of, _context in (
    (variant_forward, _forward_fake, _gradient, _setup_context),
    (variant_backward, _backward_fake, _second_derivative, None),
):
    torch.library.register_fake(_operator.name(), _fake)
    torch.library.register_autograd(_operator.name(), _of, setup_context=_context)
