"""Which tokens of a sequence each rank holds, and whole tensors to shards and back.

Of R ranks that share a sequence, rank r holds

- contiguous: the r-th of R equal chunks;
- zigzag: of 2 R equal chunks the r-th and the r-th from the end, one behind the other, so that all
  ranks have as much to do under a causal mask;
- stripe: tokens r, r + R, r + 2 R, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("zigzag", "contiguous", "stripe")


class Chunk(NamedTuple):
    """Tokens of a rank that are `step` apart: its `rows` rows from `row` on are the tokens `first`,
    `first + step`, ..."""

    row: int
    rows: int
    first: int
    step: int = 1


def check_layout(layout: str, allowed: tuple[str, ...] = LAYOUTS) -> None:
    if layout not in allowed:
        error = ValueError if isinstance(layout, str) else TypeError
        raise error(f"layout is {layout!r}, must be {' or '.join(map(repr, allowed))}")


def chunks_of_all(layout: str, ranks: int) -> int:
    """The number of equal chunks that a sequence is cut into."""
    return 2 * ranks if layout == "zigzag" else ranks


def check_tokens(tokens: int, layout: str, ranks: int) -> None:
    """Raises ValueError unless a sequence of so many tokens can be cut."""
    chunks = chunks_of_all(layout, ranks)
    if tokens % chunks != 0:
        fits = tokens + -tokens % chunks
        raise ValueError(
            f"the whole sequence has {tokens} tokens, must be a multiple of {chunks} for layout "
            f"{layout!r} on {ranks} ranks: pad it to {fits}"
        )


def chunks_of(layout: str, rank: int, ranks: int, tokens: int) -> tuple[Chunk, ...]:
    """What a rank holds of a sequence, in the order of its rows."""
    size = tokens // chunks_of_all(layout, ranks)
    if layout == "stripe":
        return (Chunk(0, size, rank, ranks),)
    if layout == "contiguous":
        return (Chunk(0, size, rank * size),)
    return Chunk(0, size, rank * size), Chunk(size, size, (2 * ranks - 1 - rank) * size)


def part_of(x: Tensor, dim: int, layout: str, rank: int, ranks: int) -> Tensor:
    """What a rank holds of a whole tensor along a dimension; where it can be, a view."""
    chunks = chunks_of(layout, rank, ranks, x.shape[dim])
    if layout == "stripe":
        return torch.unflatten(x, dim, (-1, ranks)).select(dim % x.dim() + 1, rank)
    parts = [x.narrow(dim, chunk.first, chunk.rows) for chunk in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def whole_of(parts: Sequence[Tensor], dim: int, layout: str) -> Tensor:
    """The inverse, of what all ranks hold."""
    if layout == "stripe":
        after = dim % parts[0].dim() + 1
        return torch.stack(tuple(parts), after).flatten(after - 1, after)
    if layout == "contiguous":
        return torch.cat(tuple(parts), dim)
    halves = [x.chunk(2, dim) for x in parts]
    return torch.cat([*(x for x, _ in halves), *(x for _, x in reversed(halves))], dim)
