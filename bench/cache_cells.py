"""Attention to caches that is timed: what each sequence asks, and what its cache holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bench.cells import Cell
from bench.packed_cells import visible_pairs

# Who else is timed: peers, and the limit
VLLM, FLASHMLA, SUM = "fa3-vllm", "flashmla", "sum"

BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1}
LATENT, ROPE = 512, 64
COLD_BYTES = 150_000_000  # of K and V in turn: beyond what an L2 of 50 or 60 MB holds


@dataclass(frozen=True)
class CacheCell(Cell):
    """Sequences of `queries` new tokens, which are the last of `lengths` keys, under a causal mask;
    `seqlen` and `seqlen_k` are the longest. `element`: what the cache holds, by default numbers of
    `dtype`. With `latent` head_dim is that of the rope columns, and keys are rows of [latent |
    rope]."""

    name: str = ""
    queries: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    page_size: int = 64
    window: int = -1
    sinks: bool = False
    element: str = ""
    latent: bool = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "element", self.element or self.dtype)

    @property
    def head_dim_v(self) -> int:
        return LATENT if self.latent else self.head_dim

    @property
    def key_columns(self) -> int:
        return self.head_dim + (LATENT if self.latent else 0)

    @property
    def pages(self) -> tuple[int, ...]:
        """Of each sequence."""
        return tuple(-(-n // self.page_size) for n in self.lengths)

    @property
    def flops(self) -> int:
        pairs = sum(
            visible_pairs(q, n, self.window)
            for q, n in zip(self.queries, self.lengths, strict=True)
        )
        return 2 * pairs * self.heads * (self.key_columns + self.head_dim_v)

    @property
    def bytes(self) -> int:
        """Of K and V that some query sees, each once; factors of 8 bits not counted."""
        seen = sum(
            n if self.window < 0 else min(n, self.window + q)
            for q, n in zip(self.queries, self.lengths, strict=True)
        )
        columns = self.key_columns + (0 if self.latent else self.head_dim_v)
        return seen * self.heads_kv * columns * BYTES[self.element]

    @property
    def copies(self) -> int:
        """Of the cache, which calls take in turn: so each finds its keys cold."""
        return -(-COLD_BYTES // self.bytes)

    @property
    def window_size(self) -> tuple[int, int]:
        return (-1, -1) if self.window < 0 else (self.window, 0)

    def as_dict(self) -> dict[str, object]:
        return {**super().as_dict(), "bytes": self.bytes, "copies": self.copies}


def _cell(
    name: str, queries: list[int], lengths: list[int], shape: tuple[int, int, int], **more: Any
) -> CacheCell:
    heads, heads_kv, head_dim = shape
    sizes = {"batch": len(queries), "seqlen": max(queries), "seqlen_k": max(lengths)}
    heads_of = {"heads": heads, "heads_kv": heads_kv, "head_dim": head_dim}
    rows = {"queries": tuple(queries), "lengths": tuple(lengths)}
    more = {"dtype": "bf16", **more}
    return CacheCell(mask="causal", name=name, **sizes, **heads_of, **rows, **more)


def _shown(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


LLAMA = (64, 8, 128)


def _equal(
    batch: int,
    queries: int,
    keys: int,
    shape: tuple[int, int, int] = LLAMA,
    note: str = "",
    **more: Any,
) -> CacheCell:
    name = f"{batch} of {_shown(queries)} on {_shown(keys)}"
    if shape != LLAMA:
        name += f", {shape[0]}/{shape[1]} heads, D={shape[2]}"
    if more.get("page_size", 64) != 64:
        name += f", pages of {more['page_size']}"
    if more.get("window", -1) >= 0:
        name += f", window of {more['window']}"
    if more.get("sinks"):
        name += " and sinks"
    if note:
        name += f", {note}"
    return _cell(name, [queries] * batch, [keys] * batch, shape, **more)


def decode_grid(**more: Any) -> list[CacheCell]:
    """One query token, and a few; K and V from memory bind."""
    k = 1024
    sizes = [(1, k), (1, 4 * k), (1, 32 * k), (1, 128 * k)]
    sizes += [(8, k), (8, 8 * k), (32, 2 * k), (32, 8 * k), (128, 4 * k)]
    return [
        *(_equal(batch, 1, keys, **more) for batch, keys in sizes),
        *(_equal(32, 1, 8 * k, page_size=page, **more) for page in (1, 16, 256)),
        _equal(16, 1, 4 * k, (32, 32, 128), **more),
        _equal(64, 1, 8 * k, (8, 1, 128), **more),
        _equal(64, 1, 8 * k, (64, 8, 64), **more),
        _equal(32, 1, 8 * k, (16, 8, 256), **more),
        _equal(128, 1, 8 * k, (64, 8, 64), page_size=16, window=127, sinks=True, **more),
        *(_equal(32, tokens, 8 * k, **more) for tokens in (4, 16)),
        _equal(32, 1, 8 * k, note="8 bits", element="e4m3", **more),
        _equal(32, 1, 8 * k, page_size=16, note="8 bits", element="e4m3", **more),
    ]


def mixed(**more: Any) -> CacheCell:
    """Chunks of prompts beside sequences that generate: contexts of exp(N(7.5, 1)) keys."""
    import torch

    queries = [512] * 4 + [1] * 60
    drawn = 7.5 + torch.randn(len(queries), generator=torch.Generator().manual_seed(0))
    contexts = [min(32768, round(math.exp(x))) for x in drawn.tolist()]
    lengths = [context + count for context, count in zip(contexts, queries, strict=True)]
    return _cell("4 of 512 and 60 of 1 on exp(N(7.5, 1))", queries, lengths, LLAMA, **more)


def prefill_grid(**more: Any) -> list[CacheCell]:
    """Chunks of prompts."""
    k = 1024
    pages = (1, 8, 16, 32, 64, 128, 256, 272)
    return [
        *(_equal(4, 512, 16 * k, page_size=page, **more) for page in pages),
        _equal(2, 2 * k, 8 * k, **more),
        _equal(1, 8 * k, 8 * k, **more),
        _equal(8, 512, 512, **more),
        _equal(4, 512, 8 * k, (32, 32, 128), **more),
        _equal(4, 512, 8 * k, (28, 4, 128), **more),
        _equal(4, 512, 16 * k, (64, 8, 64), **more),
        _equal(4, 512, 16 * k, window=127, **more),
        _equal(8, 512, 8 * k, (16, 8, 256), **more),
        mixed(**more),
    ]


def short_grid(**more: Any) -> list[CacheCell]:
    """More tokens than decoding has, fewer than a chunk of a prompt."""
    k = 1024
    return [
        *(_equal(4, n, 16 * k, **more) for n in (4, 16, 17, 32, 48, 64, 96, 128, 256)),
        *(_equal(32, n, 4 * k, **more) for n in (4, 16, 17, 32, 64, 128)),
        *(_equal(1, n, 64 * k, **more) for n in (4, 16, 64, 128, 256, 512, k)),
    ]


def latent_grid(**more: Any) -> list[CacheCell]:
    """Multi-head latent attention, projections absorbed."""
    return [
        _equal(128, 1, keys, (heads, 1, ROPE), latent=True, note="latent", **more)
        for heads in (128, 16)
        for keys in (4096, 8192)
    ]


def eight_bits_grid(**more: Any) -> list[CacheCell]:
    """Caches of 8 bits, and where tokens are many the same of 16 beside them."""
    k = 1024
    bits = {"note": "8 bits", "element": "e4m3", **more}
    both = ({"note": "16 bits", **more}, bits)
    return [
        *(_equal(batch, 1, keys, **bits) for batch in (1, 8) for keys in (k, 2 * k)),
        *(_equal(32, n, 8 * k, **bits) for n in (2, 4)),
        *(_equal(32, n, 8 * k, **of) for n in (5, 8, 16) for of in both),
        *(_equal(32, 16, 8 * k, (16, 8, 256), **of) for of in both),
        *(_equal(32, 16, 8 * k, (64, 8, 64), **of) for of in both),
        *(_equal(4, 512, 16 * k, **of) for of in both),
    ]


GRIDS = {
    "decode": decode_grid,
    "prefill": prefill_grid,
    "short": short_grid,
    "latent": latent_grid,
    "eight-bits": eight_bits_grid,
}
