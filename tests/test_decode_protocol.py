"""Who waits for whom in the kernels of attention to a cache whose products are WGMMA's (load.hpp,
mainloop.hpp and turns.hpp in attention/decode): every warp a process, in any order, with barriers
as the hardware has them. Nothing here needs a GPU."""

import random
from collections import deque
from dataclasses import dataclass

import pytest
from warp_models import IDLE, WARPS, Barrier, NamedBarriers, Place, run_warps


@dataclass
class Kernel:
    stages: int
    ahead: int  # blocks that may come before a part's queries
    heads: int = 1  # of a tile
    consumers: int = 2  # warpgroups


@dataclass
class Part:
    blocks: int
    rows: int
    combined: bool  # whether consumers meet behind it, as parts of items do
    guarded: frozenset  # blocks of which not all rows see all keys
    spoiled: frozenset  # blocks of V with NaN


class Model:
    def __init__(self, kernel, parts, fault=None):
        self.kernel, self.parts, self.fault = kernel, parts, fault
        stages, consumers = range(kernel.stages), kernel.consumers * WARPS
        self.full = {x: [Barrier(WARPS) for _ in stages] for x in "kv"}
        self.empty = {x: [Barrier(consumers) for _ in stages] for x in "kv"}
        self.places = {x: [Place() for _ in stages] for x in "kv"}
        self.q_full, self.q_empty, self.q = Barrier(WARPS), Barrier(consumers), Place()
        self.named = NamedBarriers()
        self.copies = [deque() for _ in range(WARPS)]  # a warp's land in their order
        self.answers = 0

    def copy(self, warp, place, what, barrier):
        place.start_copy(warp)
        self.copies[warp].append((place, what, barrier))

    def land(self, warp):
        place, what, barrier = self.copies[warp].popleft()
        place.shares[warp] = what
        barrier.arrive()

    def producer(self, warp):
        ahead, stages = self.kernel.ahead, self.kernel.stages
        passed = q_phase = 0
        for number, part in enumerate(self.parts):
            may_be_late = ahead <= stages or self.fault == "more ahead than stages"
            late = passed > 0 and part.blocks > ahead and may_be_late
            prepared = part.blocks - 1 if self.fault == "behind all keys" else ahead * late
            for block in range(part.blocks):
                if block == prepared:
                    if self.fault != "queries do not wait":
                        yield lambda phase=q_phase: self.q_empty.has_ended(phase - 1)
                    self.copy(warp, self.q, number, self.q_full)
                    q_phase += 1
                stage, phase = (passed + block) % stages, (passed + block) // stages
                for x in "kv":
                    if self.fault != "keys do not wait" or x == "v":
                        yield lambda x=x, s=stage, p=phase: self.empty[x][s].has_ended(p - 1)
                    self.copy(warp, self.places[x][stage], (number, block), self.full[x][stage])
                    yield IDLE
            passed += part.blocks

    def consumer(self, warpgroup, warp):
        all_warps = self.kernel.consumers * WARPS
        passed = q_phase = 0
        for number, part in enumerate(self.parts):
            if part.blocks > 0:
                yield lambda phase=q_phase: self.q_full.has_ended(phase)
                q_phase += 1
            yield from self.compute(warpgroup, warp, number, part, passed)
            passed += part.blocks
            if part.combined:
                for _ in range(2):
                    yield from self.named.sync("part stored", all_warps)
            self.answers += 1

    def compute(self, warpgroup, warp, number, part, passed):
        kernel, stages = self.kernel, self.kernel.stages
        takes_turns = kernel.heads == 1 and kernel.consumers == 2 and part.rows <= 64
        turns = 2 if takes_turns else 1
        own = range(warpgroup if takes_turns else 0, part.blocks, turns)
        joins = takes_turns and part.blocks > 1
        if part.blocks > 0 and not own:
            self.q_empty.arrive()

        def place(x, block):
            return self.places[x][(passed + block) % stages]

        def wait(x, block):
            stage, phase = (passed + block) % stages, (passed + block) // stages
            yield lambda: self.full[x][stage].has_ended(phase)
            if x == "v" and block in part.guarded:
                yield from guard(block)

        def guard(block):
            alone = takes_turns or kernel.heads > 1
            warps = WARPS if alone else kernel.consumers * WARPS
            name = ("alone", warpgroup) if alone else "shared"
            if self.fault == "one barrier of V":
                name = ("alone", warpgroup if alone else 0)
            values = place("v", block)
            values.read((number, block))
            yield IDLE
            values.end_read()
            yield from self.named.sync(name, warps)
            if block not in part.spoiled or kernel.heads > 1:
                return
            values.read((number, block))  # what rows see of NaN is added to them
            yield IDLE
            values.end_read()
            if self.fault != "cleared at once":
                yield from self.named.sync(name, warps)
            if alone or warpgroup == 0:
                assert values.readers == 0 or self.fault is None, "cleared while it is read"
                values.shares[warp] = (number, block, "cleared")
            yield from self.named.sync(name, warps)

        def release(x, block):
            self.empty[x][(passed + block) % stages].arrive(turns)

        def content(x, block):
            spoiled = x == "v" and block in part.guarded & part.spoiled and kernel.heads == 1
            return (number, block, "cleared") if spoiled else (number, block)

        before = None
        for block in own:
            if before is not None:
                yield from wait("v", before)
            yield from wait("k", block)
            self.q.read(number)
            place("k", block).read(content("k", block))
            if before is not None:
                place("v", before).read(content("v", before))
            yield IDLE
            place("k", block).end_read()
            self.q.end_read()
            release("k", block)
            if block >= part.blocks - turns:
                self.q_empty.arrive()
            yield IDLE
            if before is not None:
                place("v", before).end_read()
                release("v", before)
            before = block
        if own:
            yield from wait("v", before)
            place("v", before).read(content("v", before))
            yield IDLE
            place("v", before).end_read()
            if not joins or self.fault == "freed before O is there":
                release("v", before)
        if joins:
            last = [part.blocks - 1 - (part.blocks - 1 - of) % 2 for of in (0, 1)]
            yield from self.named.sync("turns ended", 2 * WARPS)
            mine, others = place("v", last[warpgroup]), place("v", last[1 - warpgroup])
            assert mine.readers == 0, "O is written over V that is read"
            mine.shares[warp] = ("O", number, warpgroup)
            yield IDLE
            if self.fault != "O is not waited for":
                yield from self.named.sync("turns ended", 2 * WARPS)
            assert others.shares[warp] == ("O", number, 1 - warpgroup)
            yield IDLE
            if self.fault != "freed before O is there":
                release("v", last[1 - warpgroup])

    def run(self, chance):
        """Some are slow for a while, copies too."""
        consumers = range(self.kernel.consumers)
        live = {("p", w): self.producer(w) for w in range(WARPS)}
        live |= {("c", g, w): self.consumer(g, w) for g in consumers for w in range(WARPS)}
        run_warps(live, chance, self.copies, self.land)
        assert self.answers == len(self.parts) * self.kernel.consumers * WARPS


def some_part(chance, kernel):
    blocks = chance.choice((0, 1, 1, 2, 3, 4, 5, 7, 12))
    guarded = frozenset(b for b in range(blocks) if chance.random() < 0.3)
    spoiled = frozenset(b for b in range(blocks) if chance.random() < 0.5)
    rows = chance.choice((1, 64, 65, 128))
    return Part(blocks, rows, chance.random() < 0.3, guarded, spoiled)


def simulate(kernel, seed, fault=None):
    chance = random.Random(seed)
    parts = [some_part(chance, kernel) for _ in range(chance.randrange(1, 9))]
    Model(kernel, parts, fault).run(chance)


# Of the table's rows; then rows of a user's, with fewer stages than blocks are looked up.
TABLE = [Kernel(6, 2), Kernel(6, 2, heads=2), Kernel(3, 2), Kernel(5, 4)]
OTHERS = [Kernel(2, 2), Kernel(4, 4), Kernel(3, 4), Kernel(2, 4), Kernel(1, 2, consumers=1)]


@pytest.mark.parametrize("kernel", [*TABLE, *OTHERS], ids=str)
def test_every_block_is_read_as_it_was_copied(kernel):
    for seed in range(60):
        simulate(kernel, seed)


FAULTS = {
    "more ahead than stages": Kernel(3, 4),
    "behind all keys": Kernel(3, 2),
    "queries do not wait": Kernel(3, 2),
    "keys do not wait": Kernel(3, 2),
    "freed before O is there": Kernel(3, 2),
    "O is not waited for": Kernel(3, 2),
    "one barrier of V": Kernel(3, 2),
    "cleared at once": Kernel(3, 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    def is_found(seed):
        try:
            simulate(FAULTS[fault], seed, fault)
        except AssertionError:
            return True
        return False

    assert any(is_found(seed) for seed in range(300))
