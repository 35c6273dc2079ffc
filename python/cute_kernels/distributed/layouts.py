"""Which tokens of a sequence each rank holds, and whole tensors to shards and back.

Of R ranks that share a sequence, rank r holds

- contiguous: the r-th of R equal chunks;
- zigzag: of 2 R equal chunks the r-th and the r-th from the end, one behind the other, so that all
  ranks have as much to do under a causal mask;
- stripe: tokens r, r + R, r + 2 R, ...
"""

from __future__ import annotations

from typing import NamedTuple

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
