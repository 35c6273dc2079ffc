"""Calls with a variant."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cute_kernels.checks import check_forward, refuse_tangents
from cute_kernels.reference import Sequence, mask_of, without_autocast
from cute_kernels.torch_private import (
    called_while_tracing,
    in_forward_mode,
    surely_in_transform,
)
from cute_kernels.variants.block_mask import BlockMask, check_block_mask
from cute_kernels.variants.checks import (
    check_captured,
    check_gradients,
    check_tile,
    expanded,
    sizes_of,
    with_gradient,
    without_other_gradients,
)
from cute_kernels.variants.kernels import Names, kernels_of
from cute_kernels.variants.operators import variant_forward
from cute_kernels.variants.reference import packed_variant_attention, variant_attention
from cute_kernels.variants.variant import BoundVariant, Variant, bound
from cute_kernels.varlen_checks import check_varlen_forward, rows_of_sequences

_kernels_of: Callable[..., Names] = called_while_tracing(kernels_of)


# What a block mask without a variant stands beside: partial blocks show all.
_ALL_SHOWN = Variant("all_shown", mask="return true;", mask_python=lambda key: key >= 0)


class Packed(NamedTuple):
    """Where packed sequences lie."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


def attend(
    variant: object,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Packed | None,
    softmax_scale: float | None,
    causal: bool,
    sinks: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    deterministic: bool,
    tile_config: str | None,
    sm_margin: int,
    block_mask: object = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a call with a variant, dense or packed, or with a block mask, dense; errors
    as of `flash_attn_func`."""
    given = _ALL_SHOWN() if variant is None else bound(variant)
    scale = 1.0 if softmax_scale is None else softmax_scale
    if lengths is None:
        window = (window_left, window_right)
        check_forward(q, k, v, scale, causal, None, deterministic, sinks, *window)
        sizes = sizes_of(q, k)
        blocks = None if block_mask is None else check_block_mask(block_mask, q, k)
    else:
        where = (*lengths[:4], None)
        options = (*lengths[4:], window_left, window_right, deterministic)
        check_varlen_forward(q, k, v, *where, scale, causal, sinks, *options)
        sizes = sizes_of(q, k, lengths.cu_seqlens_q, *lengths[4:])
        blocks = None
    given = given.with_tensors(expanded(given, sizes))
    check_captured(given, q, sizes)
    _check_hooks(given, q)
    check_tile(given, tile_config, blocks is not None)
    on_cuda = q.device.type == "cuda"
    if in_forward_mode():
        refuse_tangents(q, k, v, sinks, *given.tensors)
    if on_cuda and not torch.compiler.is_compiling() and surely_in_transform():
        raise NotImplementedError(
            "attention with a variant or a block mask has no torch.func transforms on CUDA"
        )
    names = with_gradient(given, on_cuda)
    given = without_other_gradients(given, names)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    call = (q, k, v, lengths, softmax_scale, causal, sinks, window_left, window_right)
    if on_cuda:
        return _on_cuda(given, names, *call, deterministic, tile_config, sm_margin, blocks)
    return _in_python(given, *call, blocks)


def _check_hooks(given: BoundVariant, q: Tensor) -> None:
    """Raises NotImplementedError if a hook is missing in the language of the device."""
    variant, on_cuda = given.variant, q.device.type == "cuda"
    for hook, function in variant.python.items():
        body = getattr(variant.hooks, hook)
        if on_cuda and function is not None and body is None:
            raise NotImplementedError(
                f"variant {variant.name} has {hook}_python, but no {hook}: CPU only"
            )
        if not on_cuda and function is None and body is not None:
            raise NotImplementedError(
                f"variant {variant.name} has {hook}, but no {hook}_python: CUDA only"
            )


def _on_cuda(
    given: BoundVariant,
    names: list[str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Packed | None,
    softmax_scale: float,
    causal: bool,
    sinks: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    deterministic: bool,
    tile_config: str | None,
    sm_margin: int,
    blocks: BlockMask | None,
) -> tuple[Tensor, Tensor]:
    """`names`: the captured tensors whose gradients there are to be."""
    key = given.variant.key_of(blocks is not None)
    check_gradients(given, names, lengths is not None)
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    has_gradient = torch.is_grad_enabled() and (bool(names) or any(x.requires_grad for x in inputs))
    # A compiler's constants, also where it knows no other number of this size.
    head_dims = operator.index(q.shape[-1]), operator.index(v.shape[-1])
    kernels = _kernels_of(key, q.dtype, *head_dims, has_gradient, tuple(names), tile_config)
    gradients_of = [
        i for i, tensor in enumerate(given.variant.hooks.tensors) if tensor.name in names
    ]
    where = lengths or (None,) * 6
    out, lse = variant_forward(
        q,
        k,
        v,
        *where[:4],
        given.tensors,
        [] if blocks is None else list(blocks.lists),
        [float(number) for number in given.numbers],
        key,
        kernels.forward,
        kernels.backward,
        gradients_of,
        softmax_scale,
        causal,
        sinks,
        *where[4:],
        window_left,
        window_right,
        deterministic,
        sm_margin,
    )
    return out, lse


def _in_python(
    given: BoundVariant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Packed | None,
    softmax_scale: float,
    causal: bool,
    sinks: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    blocks: BlockMask | None,
) -> tuple[Tensor, Tensor]:
    mask = mask_of(causal, window_left, window_right)
    if lengths is None:
        with without_autocast(q):
            out, lse = variant_attention(given, q, k, v, softmax_scale, mask, sinks, blocks)
        return _of_inputs(out, q, k, v), lse
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k = lengths
    queries = rows_of_sequences("q", q, cu_seqlens_q, seqused_q, max_seqlen_q)
    keys = rows_of_sequences("k", k, cu_seqlens_k, seqused_k, max_seqlen_k)
    sequences = [Sequence(a, b, None) for a, b in zip(queries, keys, strict=True)]
    with without_autocast(q):
        out, lse = packed_variant_attention(given, q, k, v, sequences, softmax_scale, mask, sinks)
    return _of_inputs(out, q, k, v), lse


def _of_inputs(out: Tensor, *inputs: Tensor) -> Tensor:
    """The same, with a gradient of each input, if of zeros: a hook may use no score, and packed
    sequences may be none."""
    for x in inputs:
        out = out + x[..., :0].sum()
    return out
