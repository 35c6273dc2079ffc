"""Whole tensors to the parts that ranks hold, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cute_kernels.checks import check_int, check_tensor
from cute_kernels.distributed.checks import Group, documents_of, groups_of
from cute_kernels.distributed.exchange import Ranks
from cute_kernels.distributed.layouts import check_layout, check_tokens, part_of, whole_of


def shard(x: Tensor, group: Group = None, dim: int = 1, layout: str = "zigzag") -> Tensor:
    """What this rank holds of a whole tensor, that all ranks have: its own rows of dimension `dim`.

    Of R ranks, rank r holds with layout

    - "contiguous" the r-th of R equal chunks,
    - "zigzag" of 2 R equal chunks the r-th and the r-th from the end,
    - "stripe" rows r, r + R, r + 2 R, ...

    With a mesh of two dimensions, (ring, heads), this is what the ranks along the first hold, and
    those along the second hold equal chunks of that: what `ulysses_attn_func` takes.

    Args:
        x: any tensor, of which dimension `dim` is the sequence: embeddings, position ids, labels.
            Labels that are the next tokens are to be shifted before: see `next_tokens`.
        group: the ranks, as of `ring_attn_func`.

    Returns:
        A contiguous tensor, which may be x itself where there is one rank; gradients go back to the
        rows of x.

    Raises:
        ValueError, TypeError: the rows cannot be shared evenly (the message says what to pad to),
            or another argument is not as described.
    """
    check_tensor("x", x)
    check_int("dim", dim, least=-x.dim(), none="")
    if dim >= x.dim():
        raise ValueError(f"dim is {dim}, must be below {x.dim()}, the dimensions of x")
    for ranks, of_layout in _levels(group, layout):
        check_tokens(x.shape[dim], of_layout, ranks.size)
        x = part_of(x, dim, of_layout, ranks.rank, ranks.size)
    return x.contiguous()


def unshard(x: Tensor, group: Group = None, dim: int = 1, layout: str = "zigzag") -> Tensor:
    """The whole tensor on every rank, the inverse of `shard`. Has no gradient.

    Raises:
        NotImplementedError: x needs a gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(
            "unshard has no gradient: call it under torch.no_grad() or on x.detach()"
        )
    for ranks, of_layout in reversed(_levels(group, layout)):
        check_tokens(x.shape[dim] * ranks.size, of_layout, ranks.size)
        parts = [x.new_empty(x.shape) for _ in range(ranks.size)]
        dist.all_gather(parts, x.contiguous(), group=ranks.group)
        x = whole_of(parts, dim, of_layout)
    return x


def positions(
    tokens: int,
    group: Group = None,
    layout: str = "zigzag",
    cu_seqlens: Sequence[int] | Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(rows,), int64: where in the whole sequence of `tokens` tokens this rank's rows are, for
    embeddings and rotations of positions; with `cu_seqlens` where in their document."""
    check_int("tokens", tokens, least=0, none="")
    at = torch.arange(tokens, device="cpu")
    if cu_seqlens is not None:
        starts = torch.tensor(documents_of(cu_seqlens, tokens), device="cpu")
        at = at - starts[torch.searchsorted(starts, at, right=True) - 1]
    return shard(at, group, 0, layout).to(device or torch.get_default_device())


def next_tokens(
    tokens: Tensor,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels of a language model, of a whole (..., seqlen) tensor of token ids, to be sharded as
    they are: at each place the token after it, and `ignore_index` at the end of the sequence, with
    `cu_seqlens` of each document."""
    labels = torch.full_like(tokens, ignore_index)
    labels[..., :-1] = tokens[..., 1:]
    if cu_seqlens is not None:
        ends = documents_of(cu_seqlens, tokens.shape[-1])[1:]
        labels[..., [end - 1 for end in ends if end > 0]] = ignore_index
    return labels


def _levels(group: Group, layout: str) -> list[tuple[Ranks, str]]:
    """The ranks that cut what is left by those before them."""
    check_layout(layout)
    ranks = [Ranks.of(one) for one in groups_of(group, (1, 2))]
    return list(zip(ranks, (layout, "contiguous"), strict=False))
