"""What each rank has to compute, send and receive: arithmetic alone, the same on every rank.

Visibility is a band: the key in row j is seen from the query in row i if ``low <= j - i <= high``.
Between two chunks of equal step it stays one when positions become rows of a shard.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from cute_kernels.distributed.layouts import Chunk, chunks_of

Interval = tuple[int, int]  # rows from, to before

# A call of fewer rows of queries, over its heads, leaves multiprocessors without work.
_LEAST_ROWS = 2 * 132 * 128


class Problem(NamedTuple):
    """One attention over all ranks. A document is seen from inside only; `documents` are where each
    begins, and the end of the last; a dense call has one."""

    layout: str
    ranks: int
    tokens: int
    documents: tuple[int, ...]
    left: int | None  # a query sees keys from `left` before it to `right` after it, None: no limit
    right: int | None


class Block(NamedTuple):
    """Queries and keys of one document, as rows of two shards, and which see which: inside of the
    block, key j is seen from query i if ``low <= j - i <= high``. Every query sees a key, every key
    is seen."""

    queries: Interval
    keys: Interval
    low: float
    high: float

    @property
    def sizes(self) -> tuple[int, int]:
        return self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]

    @property
    def is_full(self) -> bool:
        queries, keys = self.sizes
        return self.low <= 1 - queries and self.high >= keys - 1

    def seen(self) -> int:
        """How many pairs of a query and a key see each other."""
        queries, keys = self.sizes
        return _pairs_up_to(self.high, queries, keys) - _pairs_up_to(self.low - 1, queries, keys)

    def mask(self, left: int | None, right: int | None) -> tuple[int | None, int | None, int]:
        """Left, right and diagonal of a call, and as far as possible the same left and right for
        all blocks of a problem with these limits."""
        queries, keys = self.sizes
        if right is not None and left is None:
            return None, 0, int(min(self.high, keys - 1))
        if left is not None and right is None:
            return 0, None, int(max(self.low, 1 - queries))
        if left is None or right is None or self.is_full:
            return None, None, keys - queries
        high = int(min(self.high, keys - 1))
        return int(high - max(self.low, 1 - queries)), 0, high


class Part(NamedTuple):
    """One call of a kernel: blocks of the same left and right, of one document each. Rows of each
    block follow those of the block before it, in queries and in keys."""

    blocks: tuple[Block, ...]
    left: int | None
    right: int | None
    diagonals: tuple[int, ...]

    @property
    def queries(self) -> Interval:
        return self.blocks[0].queries[0], self.blocks[-1].queries[1]

    @property
    def keys(self) -> Interval:
        return self.blocks[0].keys[0], self.blocks[-1].keys[1]


@functools.lru_cache(maxsize=4096)
def parts(problem: Problem, rank: int, source: int) -> tuple[Part, ...]:
    """What the queries of a rank see of the keys of another or its own."""
    layout, ranks, tokens, *_ = problem
    held, shown = (chunks_of(layout, r, ranks, tokens) for r in (rank, source))
    return _in_calls(problem, _blocks_of_documents(problem, held, shown))


@functools.lru_cache(maxsize=1024)
def whole_parts(problem: Problem, rank: int) -> tuple[Part, ...]:
    """What the queries of a rank see of all keys: of the keys nothing is stored but
    `needed_tokens`. Each query is in one part at most. The layout is not "stripe"."""
    parts = _parts_of_tokens(problem, rank)
    return packed_keys(parts, needed_tokens(problem, rank))


@functools.lru_cache(maxsize=1024)
def _parts_of_tokens(problem: Problem, rank: int) -> tuple[Part, ...]:
    held = chunks_of(problem.layout, rank, problem.ranks, problem.tokens)
    everything = (Chunk(0, problem.tokens, 0),)
    blocks = (_blocks_of_documents(problem, (chunk,), everything) for chunk in held)
    return tuple(itertools.chain.from_iterable(_in_calls(problem, of_chunk) for of_chunk in blocks))


@functools.lru_cache(maxsize=4096)
def needed(problem: Problem, rank: int, source: int) -> tuple[Interval, ...]:
    """Which rows of the keys of a rank another needs."""
    return joined(block.keys for part in parts(problem, rank, source) for block in part.blocks)


@functools.lru_cache(maxsize=4096)
def parts_of_received(problem: Problem, rank: int, source: int) -> tuple[Part, ...]:
    """`parts` where of the keys only the needed rows are there, one behind the other."""
    return packed_keys(parts(problem, rank, source), needed(problem, rank, source))


def packed_keys(of: Sequence[Part], intervals: Sequence[Interval]) -> tuple[Part, ...]:
    """Parts where of the keys only these intervals are stored, one behind the other."""

    def moved(block: Block) -> Block:
        start = place(block.keys, intervals)
        return block._replace(keys=(start, start + block.sizes[1]))

    return tuple(part._replace(blocks=tuple(map(moved, part.blocks))) for part in of)


@functools.lru_cache(maxsize=1024)
def needed_tokens(problem: Problem, rank: int) -> tuple[Interval, ...]:
    """Which tokens' keys a rank needs."""
    return joined(block.keys for part in _parts_of_tokens(problem, rank) for block in part.blocks)


@functools.lru_cache(maxsize=4096)
def routes(problem: Problem, owner: int, reader: int) -> tuple[tuple[Interval, Interval], ...]:
    """For all keys that the reader needs of the owner's, as intervals: their rows in the owner's
    shard, and where they are if nothing is stored but `needed_tokens` of the reader."""
    chunks = chunks_of(problem.layout, owner, problem.ranks, problem.tokens)
    tokens = needed_tokens(problem, reader)
    result = []
    for interval in tokens:
        for rows, part in _cut(interval, chunks):
            start = place(part, tokens)
            result.append((rows, (start, start + part[1] - part[0])))
    return tuple(result)


class Return(NamedTuple):
    """Gradients of rows of a rank's keys, from the queries of another."""

    reader: int
    rows: Interval  # in the owner's shard
    read: Interval  # where the reader has them, see `routes`
    place: Interval  # if nothing is stored but all returns to the owner


@functools.lru_cache(maxsize=1024)
def returns(problem: Problem, owner: int) -> tuple[Return, ...]:
    """All of them, by reader."""
    found = [
        (reader, rows, read)
        for reader in range(problem.ranks)
        if reader != owner
        for rows, read in routes(problem, owner, reader)
    ]
    places = stored([rows for _, rows, _ in found])
    return tuple(Return(*one, place) for one, place in zip(found, places, strict=True))


def work(problem: Problem, rank: int) -> int:
    """How many pairs of a query and a key a rank computes."""
    return sum(
        block.seen()
        for source in range(problem.ranks)
        for part in parts(problem, rank, source)
        for block in part.blocks
    )


def first_heads(key_heads: int) -> int:
    """How many heads of a rank's own keys are done before those of others, in the backward pass:
    enough to hide that the first of others' keys arrive, few, as more has to return."""
    return key_heads // 4 if key_heads >= 4 else key_heads // 2


def head_groups(rows: int, key_heads: int) -> list[Interval]:
    """Key heads that are exchanged together, with `rows` rows of queries each: few at first, as
    nothing is computed meanwhile, and then each time twice as many as before, the last at least
    that."""
    size = max(1, -(-_LEAST_ROWS // max(1, rows)))
    groups, start = [], 0
    while key_heads - start >= 3 * size:
        groups.append((start, start + size))
        start, size = start + size, 2 * size
    groups.append((start, key_heads))
    return groups


def joined(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Their union, in order."""
    result: list[Interval] = []
    for start, stop in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def count(intervals: Iterable[Interval]) -> int:
    """How many rows they have."""
    return sum(stop - start for start, stop in intervals)


def stored(intervals: Sequence[Interval]) -> list[Interval]:
    """Where they are if nothing else is stored."""
    ends = list(itertools.accumulate(stop - start for start, stop in intervals))
    return list(zip([0, *ends], ends, strict=False))


def place(interval: Interval, among: Sequence[Interval]) -> int:
    """Where an interval begins if nothing is stored but `among`, of which one contains it."""
    before = 0
    for start, stop in among:
        if start <= interval[0] and interval[1] <= stop:
            return before + interval[0] - start
        before += stop - start
    raise ValueError(f"{interval} is not a part of {among}")


def _cut(interval: Interval, chunks: Sequence[Chunk]) -> Iterator[tuple[Interval, Interval]]:
    """The rows of chunks of step 1 that hold tokens of the interval, and these tokens."""
    for chunk in chunks:
        start, stop = max(interval[0], chunk.first), min(interval[1], chunk.first + chunk.rows)
        if start < stop:
            shift = chunk.row - chunk.first
            yield (start + shift, stop + shift), (start, stop)


def _pairs_up_to(high: float, queries: int, keys: int) -> int:
    """How many pairs of row i and key j have ``j - i <= high``."""
    if high >= keys - 1:
        return queries * keys
    if high < 1 - queries:
        return 0
    # Row i has high + 1 + i keys of it, from 0 to all.
    first, last = int(high) + 1, int(high) + queries
    full = max(0, last - keys + 1)
    start, stop = max(first, 1), min(last, keys - 1)
    return full * keys + max(0, stop - start + 1) * (start + stop) // 2


def _blocks_of_documents(
    problem: Problem, held: Sequence[Chunk], shown: Sequence[Chunk]
) -> list[list[Block]]:
    """For each document that has any, its blocks."""
    result = []
    for document in itertools.pairwise(problem.documents):
        queries, keys = (_inside(document, chunks) for chunks in (held, shown))
        blocks = _blocks(queries, keys, problem.left, problem.right)
        if blocks:
            result.append(blocks)
    return result


def _inside(document: Interval, chunks: Sequence[Chunk]) -> list[Chunk]:
    """What chunks hold of a document."""
    result = []
    for row, rows, first, step in chunks:
        skipped = max(0, -(-(document[0] - first) // step))
        kept = min(rows, -(-(document[1] - first) // step)) - skipped
        if kept > 0:
            result.append(Chunk(row + skipped, kept, first + skipped * step, step))
    return result


def _blocks(
    held: Sequence[Chunk], shown: Sequence[Chunk], left: int | None, right: int | None
) -> list[Block]:
    """One block for all pairs of chunks if there is one with the same visibility, else one a pair.

    Rows of the chunks follow one another on both sides.
    """
    pairs = [(q, k, *_band(q, k, left, right)) for q in held for k in shown]
    blocks = [
        block
        for q, k, low, high in pairs
        if (block := _block((q.row, q.row + q.rows), (k.row, k.row + k.rows), low, high))
    ]
    if len(blocks) < 2:
        return blocks
    queries, keys = (
        (min(i[0] for i in intervals), max(i[1] for i in intervals))
        for intervals in ([b.queries for b in blocks], [b.keys for b in blocks])
    )
    lows = {-math.inf, *(low for _, _, low, _ in pairs)}
    highs = {math.inf, *(high for _, _, _, high in pairs)}
    for low, high in itertools.product(sorted(lows), sorted(highs, reverse=True)):
        if all(
            _clipped(q, k, queries, keys, low, high) == _clipped(q, k, queries, keys, *own)
            for q, k, *own in pairs
        ):
            whole = _block(queries, keys, low, high)
            return [] if whole is None else [whole]
    return blocks


def _band(q: Chunk, k: Chunk, left: int | None, right: int | None) -> tuple[float, float]:
    """Which differences of rows see each other, rows counted as in the shards."""
    apart = k.first - k.row * k.step - q.first + q.row * q.step
    low = -math.inf if left is None else -((left + apart) // q.step)
    high = math.inf if right is None else (right - apart) // q.step
    return low, high


def _clipped(
    q: Chunk, k: Chunk, queries: Interval, keys: Interval, low: float, high: float
) -> Block | None:
    """A band as it looks from inside a pair of chunks and a larger block."""
    rows = max(q.row, queries[0]), min(q.row + q.rows, queries[1])
    columns = max(k.row, keys[0]), min(k.row + k.rows, keys[1])
    return _block(rows, columns, low, high)


def _block(queries: Interval, keys: Interval, low: float, high: float) -> Block | None:
    """The block of a band between rows of shards: without rows that see nothing, None if that are
    all, and with no limits but those that hide something."""
    start, stop = max(queries[0], keys[0] - high), min(queries[1], keys[1] - low)
    if low > high or start >= stop:
        return None
    queries = int(start), int(stop)
    keys = int(max(keys[0], queries[0] + low)), int(min(keys[1], queries[1] + high))
    if keys[0] >= keys[1]:
        return None
    shift = queries[0] - keys[0]
    low, high = low + shift, high + shift
    rows, columns = queries[1] - queries[0], keys[1] - keys[0]
    if low <= 1 - rows:
        low = -math.inf
    if high >= columns - 1:
        high = math.inf
    return Block(queries, keys, low, high)


def _in_calls(problem: Problem, of_documents: list[list[Block]]) -> tuple[Part, ...]:
    """Blocks of different documents share a call where they can; those of the same never do."""
    calls: dict[tuple[int | None, int | None, int], list[tuple[Block, int]]] = {}
    for blocks in of_documents:
        for number, block in enumerate(blocks):
            left, right, diagonal = block.mask(problem.left, problem.right)
            calls.setdefault((left, right, number), []).append((block, diagonal))
    return tuple(
        Part(tuple(block for block, _ in call), left, right, tuple(at for _, at in call))
        for (left, right, _), call in calls.items()
    )
