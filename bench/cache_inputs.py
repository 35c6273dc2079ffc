"""The caches of a cell, calls that go round their copies, and which results are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.cache_cells import LATENT, CacheCell
from bench.cells import NORMAL, Cell
from bench.check import FP8, Attention, Parts
from bench.distributions import draw
from bench.packed_inputs import sinks_of, starts
from bench.timing import Call, CapturedCall

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
SAMPLED_ROWS = 4
# Of rotated queries of 8-bit caches and of P in fp16 (tests/eight_bits.py)
ROTATED = {"noise": 2.0**-12, "underflow": 2.0**-22}


@dataclass(frozen=True)
class Caches:
    """`copies` have other numbers each and one `table`: (2, pages, page_size, key heads, head_dim),
    keys and then values, or of latent attention (pages, page_size, 1, latent and rope)."""

    copies: list[torch.Tensor]
    table: torch.Tensor  # (batch, pages of the longest sequence), what is not needed is 0
    lengths: torch.Tensor  # (batch,)
    starts: torch.Tensor  # (batch + 1,), of the queries
    sinks: torch.Tensor | None  # in the queries' dtype


def cache_inputs(cell: CacheCell, device: str = "cuda") -> tuple[torch.Tensor, Caches]:
    """Queries, (tokens, heads, head_dim), latent and rope columns of latent attention, and the
    caches. N(0, 1) or as the cell's data says; queries to e4m3 are numbers that e4m3 has, too."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, element = DTYPES[cell.dtype], DTYPES[cell.element]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).to(element)

    q = normal(sum(cell.queries), cell.heads, cell.key_columns).to(dtype)
    pages, rows = sum(cell.pages), (cell.page_size, cell.heads_kv)
    shape = (pages, *rows, cell.key_columns) if cell.latent else (2, pages, *rows, cell.head_dim)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    table = torch.zeros(cell.batch, max(cell.pages), dtype=torch.int32)
    for row, own in zip(table, order.split(list(cell.pages)), strict=True):
        row[: len(own)] = own
    sinks = sinks_of(cell.heads, q.device, dtype) if cell.sinks else None
    copies = [normal(*shape) for _ in range(cell.copies)]
    if cell.data != NORMAL:
        q = _change(cell, copies, table)
    return q, Caches(
        copies,
        table.to(device),
        torch.tensor(cell.lengths, dtype=torch.int32, device=device),
        starts(cell.queries, q.device),
        sinks,
    )


def _change(cell: CacheCell, copies: list[torch.Tensor], table: torch.Tensor) -> torch.Tensor:
    """Gives each sequence's rows of each copy the cell's data, and returns the queries of the
    last."""
    element, device = DTYPES[cell.element], copies[0].device
    names = ("dtype", "mask", "heads", "heads_kv", "head_dim", "data")
    shared = {name: getattr(cell, name) for name in names}
    largest = torch.finfo(element).max
    for number, copy in enumerate(copies):
        queries = []
        for sequence, own in enumerate(table):
            count, length = cell.queries[sequence], cell.lengths[sequence]
            one = Cell(batch=1, seqlen=count, seqlen_k=length, **shared)
            drawn = draw(one, str(device), seed=number * cell.batch + sequence)
            q, *rows = (x[0].clamp(-largest, largest).to(element) for x in drawn)
            queries.append(q.to(drawn[0].dtype))
            page = own.to(device).long()[torch.arange(length, device=device) // cell.page_size]
            place = torch.arange(length, device=device) % cell.page_size
            for pages, new in zip(copy, rows, strict=True):
                pages[page, place] = new
    return torch.cat(queries)


def rows_of(pages: torch.Tensor, caches: Caches, sequence: int, count: int) -> torch.Tensor:
    """The first `count` rows of a sequence, from (pages, page_size, ...)."""
    own = -(-count // pages.shape[1])
    return pages[caches.table[sequence, :own].long()].flatten(0, 1)[:count]


class Round:
    """A call with each copy of the cache, one behind the other; the result is that of the last,
    which is right by `reference` if it is not the cell's."""

    def __init__(self, calls: Sequence[Call], reference: Any = None):
        self.calls = calls
        self.reference = reference

    def __call__(self) -> object:
        result = None
        for call in self.calls:
            result = call()
        return result


class CapturedRound(CapturedCall):
    """Counts the calls of its rounds."""

    def __init__(self, call: Round, target_ms: float = 4.0):
        super().__init__(call, target_ms)
        self.calls *= len(call.calls)


Read = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


class CacheReference(Parts):
    """Some query rows of the first and of the last sequence in fp64, with the first and the last
    key head. `read`: keys and values of a sequence and a key head, (keys, head_dim); those of the
    last copy if None. `rounding`: as of bench.check.Reference."""

    def __init__(
        self,
        cell: CacheCell,
        q: torch.Tensor,
        caches: Caches,
        read: Read | None = None,
        **rounding: float,
    ):
        super().__init__()
        if read is None and cell.element == "e4m3":
            rounding = {**FP8, **rounding}
        read = read or (lambda *place: read_copy(cell, caches, *place))
        group = cell.heads // cell.heads_kv
        begins = caches.starts.tolist()
        for sequence in sorted({0, cell.batch - 1}):
            begin, count = begins[sequence], cell.queries[sequence]
            sampled = min(SAMPLED_ROWS, count)
            for head in sorted({0, cell.heads_kv - 1}):
                heads = slice(head * group, (head + 1) * group)
                keys, values = (x.double()[None, :, None] for x in read(sequence, head))
                for first in sorted({0, count - sampled}):
                    rows = slice(begin + first, begin + first + sampled), heads
                    exact = Attention(
                        q[rows][None],
                        keys,
                        values,
                        cell.key_columns**-0.5,
                        True,
                        first,
                        count,
                        window_size=cell.window_size,
                        sinks=None if caches.sinks is None else caches.sinks[heads],
                    )
                    vars(exact).update(rounding)
                    self._parts.append((0, rows, exact.out[0], exact.out_allowed()[0]))

    def error(self, out: torch.Tensor) -> float:
        return super().error((out,))

    def rmse(self, out: torch.Tensor) -> float:
        return super().rmse((out,))


def read_copy(
    cell: CacheCell, caches: Caches, sequence: int, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the last copy."""
    length, copy = cell.lengths[sequence], caches.copies[-1]
    if cell.latent:
        keys = rows_of(copy, caches, sequence, length)[:, 0]
        return keys, keys[:, :LATENT]
    k, v = (rows_of(pages, caches, sequence, length)[:, head] for pages in copy)
    return k, v
