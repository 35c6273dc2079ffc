"""Attention over a sequence that several ranks share: the public functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cute_kernels.arguments import Window, window_of
from cute_kernels.checks import check_softmax_scale, check_tensor, refuse_tangents
from cute_kernels.distributed.checks import Group, check_shard, documents_of, groups_of, starts_of
from cute_kernels.distributed.exchange import Ranks
from cute_kernels.distributed.heads import (
    check_heads,
    from_heads,
    lse_from_heads,
    sinks_of_heads,
    to_heads,
)
from cute_kernels.distributed.layouts import check_layout, check_tokens
from cute_kernels.distributed.operators import context_attention
from cute_kernels.interface import flash_attn_func
from cute_kernels.torch_private import in_forward_mode, surely_in_transform
from cute_kernels.varlen import flash_attn_varlen_func

Documents = Sequence[int] | Tensor | None


def ring_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    *,
    layout: str = "zigzag",
    cu_seqlens: Documents = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence of which each rank holds a part: keys and values come from
    one other rank a step, while the kernels work on what came before.

    Every rank of the group calls it with tensors of the same shapes, and gets the output of its own
    tokens. The first call of a shape compares notes with the other ranks, which waits for them.

    Args:
        q: (batch, rows, heads, head_dim), this rank's rows of the sequence as `layout` says; with
            `cu_seqlens` (rows, heads, head_dim). Dtypes, head dims and strides as of
            `flash_attn_func`.
        k, v: the same rows, of key heads as there.
        group: the ranks that share the sequence: a process group, a DeviceMesh of one dimension, or
            None for all processes.
        softmax_scale, causal, window_size, softcap, sinks: as of `flash_attn_func`, positions
            being those in the whole sequence. Of sinks each rank has the gradient that its own rows
            give: like those of all weights, these are to be summed.
        deterministic: as of `flash_attn_func`; the order of sums over ranks never varies.
        layout: which tokens a rank holds, see `shard`. "zigzag" has all ranks do as much under a
            causal mask.
        cu_seqlens: of packed sequences, where each begins in the whole sequence of all ranks, and
            where the last ends: a list of ints or an int tensor on the CPU, the same on all ranks.
            Under ``torch.compile``, a tensor: a list has it compile again for other numbers.
        return_lse: also return the LSE.

    Returns:
        The output of this rank's rows, as `flash_attn_func` (with `cu_seqlens` as
        `flash_attn_varlen_func`) returns it, and if asked for the LSE. Both have gradients, once.

    Raises:
        ValueError, TypeError: an argument is not as described, or differs between ranks.
        RuntimeError: of the process group: a rank is gone, or does not answer in the group's time.
        NotImplementedError: a second derivative, or a forward-mode one.
    """
    return _attend(
        "ring",
        q,
        k,
        v,
        group,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        layout,
        cu_seqlens,
        sinks,
        return_lse,
    )


def all_gather_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    *,
    layout: str = "zigzag",
    cu_seqlens: Documents = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence of which each rank holds a part: all keys and values that its
    queries see come to a rank, some key heads at a time, while the kernels work on others.

    Faster than `ring_attn_func` where the messages are small: short sequences, few key heads, many
    packed sequences. Takes memory for all keys of some heads. Arguments, results and errors are
    those of `ring_attn_func`, but the layout is "zigzag" or "contiguous".
    """
    check_layout(layout, ("zigzag", "contiguous"))
    return _attend(
        "all_gather",
        q,
        k,
        v,
        group,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        layout,
        cu_seqlens,
        sinks,
        return_lse,
    )


def ulysses_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    *,
    layout: str = "zigzag",
    cu_seqlens: Documents = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence of which each rank holds a part: each rank is sent the whole
    sequence for some of the heads, and sends the output back.

    Arguments, results and errors are those of `ring_attn_func`, but

    Args:
        group: also a DeviceMesh of two dimensions, (ring, heads): the ranks along the second share
            the heads, those along the first the sequence, by `ring_attn_func`. The number of query
            heads and that of key heads must be multiples of the ranks that share heads.
        layout: of the ranks along the first dimension of a mesh of two; those that share heads hold
            equal chunks of what each of these holds, as `shard` gives them. With one dimension,
            "contiguous" is the fastest: others cost a copy each way.
    """
    ring, of_heads = _two_groups(group)
    ranks = Ranks.of(of_heads)
    check_layout(layout)
    causal, left, right = window_of(window_size, causal)
    packed = cu_seqlens is not None
    scale = _scale_of(q, softmax_scale)
    if not torch.compiler.is_compiling():  # operators refuse the same then
        call = (scale, causal, left, right, softcap, deterministic, sinks, packed)
        check_shard(q, k, v, *call)
        _refuse_transforms(q, k, v, sinks)
    check_heads(q, k, ranks.size)
    way = (of_heads.group_name, ranks.size, layout if ring is None else "contiguous")
    check_tokens(q.shape[-3] * ranks.size, way[2], ranks.size)
    q, k, v = to_heads(q, k, v, (scale, causal, left, right, softcap), *way)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "deterministic": deterministic,
        "sinks": sinks_of_heads(sinks, ranks),
        "return_lse": True,
    }
    if ring is not None:
        result = ring_attn_func(q, k, v, ring, layout=layout, cu_seqlens=cu_seqlens, **options)
    elif cu_seqlens is None:
        result = flash_attn_func(q, k, v, **options)
    else:
        lengths, longest = _lengths(cu_seqlens, q)
        result = flash_attn_varlen_func(q, k, v, lengths, lengths, longest, longest, **options)
    out = from_heads(result[0], *way)
    return (out, lse_from_heads(result[1], *way)) if return_lse else out


def _lengths(cu_seqlens: Documents, q: Tensor) -> tuple[Tensor, int | None]:
    """cu_seqlens on q's device, and the longest sequence, if numbers of the host may be read."""
    starts = starts_of(cu_seqlens)
    longest = None
    if not torch.compiler.is_compiling():
        documents = documents_of(starts, q.shape[0])
        longest = max((b - a for a, b in itertools.pairwise(documents)), default=0)
    return starts.to(q.device, torch.int32, non_blocking=True), longest


def _scale_of(q: Tensor, softmax_scale: float | None) -> float:
    """softmax_scale or its default; checked are only what that needs, and that it is a number."""
    check_tensor("q", q)
    if softmax_scale is None:
        head_dim = q.shape[-1] if q.dim() else 0
        return head_dim**-0.5 if head_dim else 1.0
    check_softmax_scale(softmax_scale, torch.float64)
    return float(softmax_scale)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """Operators have no rules for torch.func, and would drop tangents in silence."""
    if surely_in_transform():
        raise NotImplementedError("attention over several ranks has no torch.func transforms")
    if in_forward_mode():
        refuse_tangents(*tensors)


def _two_groups(group: Group) -> tuple[Any, Any]:
    groups = groups_of(group, (1, 2))
    return (None, groups[0]) if len(groups) == 1 else (groups[0], groups[1])


def _attend(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    deterministic: bool,
    layout: str,
    cu_seqlens: Documents,
    sinks: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    (of_ranks,) = groups_of(group)
    check_layout(layout)
    causal, left, right = window_of(window_size, causal)
    scale = _scale_of(q, softmax_scale)
    packed = cu_seqlens is not None
    if not torch.compiler.is_compiling():  # operators refuse the same then
        call = (scale, causal, left, right, softcap, deterministic, sinks, packed)
        check_shard(q, k, v, *call)
        _refuse_transforms(q, k, v, sinks)
    ranks = Ranks.of(of_ranks)
    tokens = q.shape[-3] * ranks.size
    check_tokens(tokens, layout, ranks.size)
    starts = starts_of(cu_seqlens) if packed else None
    deterministic = torch.are_deterministic_algorithms_enabled() or deterministic
    out, lse = context_attention(
        q,
        k,
        v,
        sinks,
        starts,
        of_ranks.group_name,
        form,
        layout,
        scale,
        left,
        0 if causal else right,
        softcap,
        deterministic,
    )
    return (out, lse) if return_lse else out
