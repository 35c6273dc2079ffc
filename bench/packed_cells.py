"""Packed sequences that are timed: documents of many lengths, equal lengths, windows, head dims."""

from __future__ import annotations

from dataclasses import dataclass

from bench.cells import Cell

TOKENS = 32768


@dataclass(frozen=True)
class PackedCell(Cell):
    """Sequences of `lengths` one behind the other, each under a causal mask; `seqlen` is the
    longest. `window`: how many keys before its own a query sees, -1 for all."""

    name: str = ""
    lengths: tuple[int, ...] = ()
    head_dim_v: int = 0
    window: int = -1
    sinks: bool = False

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, for one head."""
        return sum(visible_pairs(n, n, self.window) for n in self.lengths)

    @property
    def flops(self) -> int:
        """Of what masks leave, which for short windows is not half of all."""
        return 2 * self.pairs * self.heads * (self.head_dim + self.head_dim_v)

    @property
    def equal(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def window_size(self) -> tuple[int, int]:
        return (-1, -1) if self.window < 0 else (self.window, 0)


class PackedBackwardCell(PackedCell):
    """The same problem's gradients."""

    @property
    def flops(self) -> int:
        """Three products over the head dim (Q K, dQ, dK), two over V's (dP, dV)."""
        return 2 * self.pairs * self.heads * (3 * self.head_dim + 2 * self.head_dim_v)


def visible_pairs(queries: int, keys: int, window: int = -1) -> int:
    """How many keys the queries see together: the last query stands at the last key, query i sees
    those up to its own and at most `window` before that."""
    most = keys if window < 0 else min(keys, window + 1)
    first = keys - queries + 1  # what the first query sees without a window
    rising = max(0, min(queries, most - first))  # queries that see less than `most`
    return rising * first + rising * (rising - 1) // 2 + (queries - rising) * most


def documents(tokens: int = TOKENS) -> tuple[int, ...]:
    """Log-normal lengths from 16 to 16384; the last document is cut."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = int(torch.empty(1).log_normal_(6.5, 1.2, generator=generator).item())
        lengths.append(min(max(16, drawn), 16384, tokens - sum(lengths)))
    return tuple(lengths)


def packed_grid(dtype: str, backward: bool = False) -> list[PackedCell]:
    kind = PackedBackwardCell if backward else PackedCell

    def cell(name, lengths, heads, head_dim, heads_kv=0, head_dim_v=0, window=-1, sinks=False):
        return kind(
            dtype=dtype,
            mask="causal",
            batch=len(lengths),
            seqlen=max(lengths),
            heads=heads,
            head_dim=head_dim,
            heads_kv=heads_kv,
            name=name,
            lengths=tuple(lengths),
            head_dim_v=head_dim_v or head_dim,
            window=window,
            sinks=sinks,
        )

    def equal(length, tokens=TOKENS):
        return [length] * (tokens // length)

    lengths = documents()
    many = f"{len(lengths)} documents"
    cells = [
        *(cell(f"{many}, D={d}", lengths, 2048 // d, d) for d in (64, 128, 256)),
        cell("equal lengths of 2k, D=128", equal(2048), 16, 128),
        cell("equal lengths of 8k, D=128", equal(8192), 16, 128),
        cell("window of 127, 64/8 heads, D=64", equal(8192), 64, 64, 8, window=127),
        cell("window of 1023, 32/16 heads, D=128", equal(16384), 32, 128, 16, window=1023),
        cell("window of 4095, 32/8 heads, D=128, 16k", equal(16384), 32, 128, 8, window=4095),
        cell("window of 4095, 32/8 heads, D=128, 32k", equal(32768), 32, 128, 8, window=4095),
        cell("D=96, 32 heads", equal(8192, 16384), 32, 96),
        cell("D=192, 16 heads", equal(8192, 16384), 16, 192),
    ]
    heads = 32 if backward else 128
    for length in (4096, 16384):
        name = f"D=192, V's 128, {heads} heads, {length // 1024}k"
        cells.append(cell(name, equal(length, 16384), heads, 192, head_dim_v=128))
    if not backward:  # the peer of the backward pass has no sinks
        gpt = (equal(8192), 64, 64, 8)
        cells += [
            cell("window of 127 and sinks, 64/8 heads, D=64", *gpt, window=127, sinks=True),
            cell("sinks, 64/8 heads, D=64", *gpt, sinks=True),
        ]
    return cells
