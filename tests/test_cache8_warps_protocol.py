"""Who waits for whom in the kernel of a cache of 8 bits and few rows (fp8_warps_mainloop.hpp,
fp8_warps_queries.hpp and fp8_warps_join.hpp in attention/decode): every warp a process, in any
order, with barriers as the hardware has them. Nothing here needs a GPU."""

import random
from collections import deque
from dataclasses import dataclass

import pytest
from warp_models import IDLE, Barrier, NamedBarriers, Place, run_warps
from warp_models import WARPS as PRODUCERS

WARPS = 8  # of consumers
ROWS = 16  # of a warp
GROUPS = 2  # of rows
HALF = ROWS // 2
KEYS, FEW_KEYS = 32, 8  # of a slice


@dataclass
class Kernel:
    tile_n: int
    stages: int
    rows_at_once: int  # of queries, that a warp reads
    apart: bool = False  # queries have memory of their own, or lie where O does
    kept: bool = True  # queries stay in registers


@dataclass
class Part:
    blocks: int
    rows: int
    combined: bool  # whether consumers meet behind it, as parts of items do


class Region:
    """Shared memory of several pieces, which warps write one by one."""

    def __init__(self):
        self.pieces, self.readers = {}, 0

    def write(self, kind, piece, what):
        assert self.readers == 0, f"{what} written while it is read"
        if any(other != kind for other, _ in self.pieces):
            self.pieces = {}
        self.pieces[kind, piece] = what

    def read(self, kind, expected):
        """For a while. Pieces that are not expected may be there, of a part before."""
        for piece, what in expected.items():
            assert self.pieces.get((kind, piece)) == what
        self.readers += 1
        yield IDLE
        self.readers -= 1


class Model:
    def __init__(self, kernel, parts, fault=None):
        self.kernel, self.parts, self.fault = kernel, parts, fault
        stages = range(kernel.stages)
        self.full = {x: [Barrier(PRODUCERS) for _ in stages] for x in "kv"}
        self.empty = {x: [Barrier(WARPS) for _ in stages] for x in "kv"}
        self.places = {x: [Place() for _ in stages] for x in "kv"}
        self.copies = [deque() for _ in range(PRODUCERS)]  # a warp's land in their order
        self.named = NamedBarriers()
        self.out = [Region() for _ in range(WARPS)]
        of_group = WARPS // GROUPS
        self.q = [Region() if kernel.apart else self.out[i * of_group] for i in range(GROUPS)]
        self.query_units = [Region() for _ in range(GROUPS)]
        self.value_unit, self.is_last = Region(), Region()
        self.statistics = [Region() for _ in range(WARPS)]
        self.answers = 0

    def producer(self, warp):
        passed = 0
        for number, part in enumerate(self.parts):
            for block in range(part.blocks):
                stage, phase = divmod(passed + block, self.kernel.stages)[::-1]
                for x in "kv":
                    yield lambda x=x, s=stage, p=phase: self.empty[x][s].has_ended(p - 1)
                    self.places[x][stage].start_copy(warp)
                    what = (number, block)
                    self.copies[warp].append((self.places[x][stage], what, self.full[x][stage]))
                    yield IDLE
            passed += part.blocks

    def land(self, warp):
        place, what, barrier = self.copies[warp].popleft()
        place.shares[warp] = what
        barrier.arrive()

    def meet(self, name):
        if self.fault != name:
            yield from self.named.sync("turns ended", WARPS)

    def consumer(self, warp):
        passed = 0
        for number, part in enumerate(self.parts):
            groups = 1 if part.rows <= ROWS else GROUPS
            step = WARPS // groups
            group, own = warp // step, warp % step
            if part.blocks > 0:
                yield from self.load(number, part, group, own, step)
            yield from self.meet("queries are there")
            if part.blocks > 0:
                yield from self.compute(number, part, group, own, step, passed)
            passed += part.blocks
            yield from self.join(number, part, warp, group * step, step)
            if part.combined:
                yield from self.combine(number, warp)
            self.answers += 1

    def passes(self, part, group):
        rows = part.rows - group * ROWS
        return (ROWS if rows > HALF else HALF) // self.kernel.rows_at_once

    def load(self, number, part, group, own, step):
        for i in range(own, self.passes(part, group), step):
            yield IDLE
            self.q[group].write("q", i, number)
            self.query_units[group].write("unit", i, number)
            if i == 0:
                self.value_unit.write("unit", 0, number)

    def compute(self, number, part, group, own, step, passed):
        kernel, stages = self.kernel, self.kernel.stages
        few_blocks = 2 * WARPS * FEW_KEYS // kernel.tile_n
        keys = FEW_KEYS if part.rows <= HALF and part.blocks <= few_blocks else KEYS
        slices = kernel.tile_n // keys  # of a block
        arrivals = 1 if self.fault == "one arrival" else max(1, step // slices)
        queries = dict.fromkeys(range(self.passes(part, group)), number)
        if own // slices >= part.blocks:
            return
        yield from self.query_units[group].read("unit", queries)
        if kernel.kept:
            yield from self.q[group].read("q", queries)
        for i in range(own, part.blocks * slices, step):
            block = i // slices
            phase, stage = divmod(passed + block, stages)
            for x in "kv":
                yield lambda x=x, s=stage, p=phase: self.full[x][s].has_ended(p)
                self.places[x][stage].read((number, block))
                if x == "k" and not kernel.kept:
                    yield from self.q[group].read("q", queries)
                yield IDLE
                self.places[x][stage].end_read()
                if (i + step) // slices != block or self.fault == "freed by each slice":
                    self.empty[x][stage].arrive(arrivals)
        yield from self.value_unit.read("unit", {0: number})

    def join(self, number, part, warp, first, step):
        if not self.kernel.apart:
            yield from self.meet("queries have been read")
        self.statistics[warp].write("of warp", 0, number)
        for half in range(2 if part.rows > HALF else 1):
            if half > 0:
                yield from self.meet("the first rows have been read")
            yield IDLE
            self.out[warp].write("O", 0, (number, half))
            yield from self.meet("O is there")
            for other in range(first, first + step):
                yield from self.statistics[other].read("of warp", {0: number})
                yield from self.out[other].read("O", {0: (number, half)})
        if not self.kernel.apart:
            yield from self.meet("O has been read")

    def combine(self, number, warp):
        yield from self.named.sync("part stored", WARPS)
        if warp == 0:
            self.is_last.write("last", 0, number)
        yield from self.named.sync("part stored", WARPS)
        yield from self.is_last.read("last", {0: number})

    def run(self, chance):
        """Some are slow for a while, copies too."""
        live = {("p", w): self.producer(w) for w in range(PRODUCERS)}
        live |= {("c", w): self.consumer(w) for w in range(WARPS)}
        run_warps(live, chance, self.copies, self.land)
        assert self.answers == len(self.parts) * WARPS


def simulate(kernel, seed, fault=None):
    chance = random.Random(seed)
    parts = [
        Part(
            chance.choice((0, 1, 1, 2, 2, 3, 4, 5, 13)),
            chance.choice((1, 8, 8, 9, 16, 17, 24, 25, 32)),
            chance.random() < 0.3,
        )
        for _ in range(chance.randrange(1, 7))
    ]
    Model(kernel, parts, fault).run(chance)


D64, D128, D256 = TABLE = [
    Kernel(128, 12, 4),
    Kernel(64, 11, 2, apart=True),
    Kernel(32, 9, 1, kept=False),
]
# With as few stages as a row of a user's may have.
OTHERS = [Kernel(128, 2, 4), Kernel(64, 4, 2, apart=True), Kernel(32, 8, 1, kept=False)]


@pytest.mark.parametrize("kernel", [*TABLE, *OTHERS], ids=str)
def test_every_block_and_row_is_read_as_it_was_written(kernel):
    for seed in range(100):
        simulate(kernel, seed)


FAULTS = [
    ("queries are there", D64),
    ("queries are there", D128),
    ("queries have been read", D64),
    ("queries have been read", D256),
    ("the first rows have been read", D128),
    ("O is there", D128),
    ("O has been read", D64),
    ("O has been read", D256),
    ("one arrival", D256),
    ("freed by each slice", D64),
]


@pytest.mark.parametrize(("fault", "kernel"), FAULTS, ids=str)
def test_faults_are_found(fault, kernel):
    def is_found(seed):
        try:
            simulate(kernel, seed, fault)
        except AssertionError:
            return True
        return False

    assert any(is_found(seed) for seed in range(300))
