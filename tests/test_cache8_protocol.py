"""Who waits for whom in the kernel of a cache of 8 bits and many rows (mainloop.hpp, turns.hpp and
fp8_wide_load.hpp in attention/decode): every warp a process, in any order, barriers as the hardware
has them, of whose phase a bit is known. Nothing here needs a GPU."""

import random

import pytest
from warp_models import IDLE, WARPS, Barrier, run_warps


class Shared:
    def __init__(self, stages, staged, slots, consumers, fault):
        """`staged` slots are on their way, of which a block has `slots`."""
        self.stages, self.staged, self.slots, self.fault = stages, staged, slots, fault
        self.consumers = consumers
        self.full = {x: [Barrier(WARPS) for _ in range(stages)] for x in "kv"}
        self.empty = {x: [Barrier(consumers * WARPS) for _ in range(stages)] for x in "kv"}
        self.data = {x: [[None] * WARPS for _ in range(stages)] for x in "kv"}
        self.turns_ended = Barrier(consumers * WARPS)
        self.handed = {}


class Loader:
    """What a producer warp knows of K or of V."""

    def __init__(self, shared, array, warp):
        self.shared, self.array, self.warp = shared, array, warp
        self.copied = []  # (block, slot), in order
        self.converted = 0

    def copy(self, number):
        """Of a block, slot by slot; the groups of copies are the warp's."""
        for slot in range(self.shared.slots):
            if len(self.copied) - self.converted == self.shared.staged:
                yield from self.convert()
            self.copied.append((number, slot))
            self.groups.append(self)

    def convert(self):
        shared, (number, slot) = self.shared, self.copied[self.converted]
        # All groups but the last so many have landed.
        ahead = self.arrays * shared.staged - (0 if shared.fault == "late" else 1)
        landed = self.groups[: len(self.groups) - ahead].count(self)
        assert self.converted < landed, "a copy is read before it has landed"
        stage, phase = number % shared.stages, number // shared.stages
        if slot == 0 and shared.fault != "full":
            yield lambda: shared.empty[self.array][stage].has_ended(phase - 1)
        yield IDLE
        written = shared.data[self.array][stage]
        before = slot == 0 or written[self.warp] == (number, slot - 1)
        assert before, "a stage is written by another block"
        written[self.warp] = (number, slot)
        self.converted += 1
        yield IDLE
        if slot == shared.slots - 1:
            shared.full[self.array][stage].arrive()

    def fill_groups(self):
        missing = self.shared.staged - (len(self.copied) - self.converted)
        self.groups += [None] * missing


def producer(shared, arrays, warp, numbers):
    """A warp that copies and converts the blocks `numbers` of K, of V or of both in turn."""
    loaders = [Loader(shared, array, warp) for array in arrays]
    groups = []  # of copies, in order: whose they are
    for loader in loaders:
        loader.groups, loader.arrays = groups, len(arrays)
    for number in numbers:
        for loader in loaders:
            yield from loader.copy(number)
    for loader in loaders:
        loader.fill_groups()
    while any(loader.converted < len(loader.copied) for loader in loaders):
        for loader in loaders:
            yield from loader.convert()
            groups.append(None)


def consumer(shared, warpgroup, warp, parts, has_factors):
    """`parts`: (blocks, whether warpgroups take turns) of each part."""
    passed = meetings = 0

    def wait(array, number):
        stage, phase = number % shared.stages, number // shared.stages
        yield lambda: shared.full[array][stage].has_ended(phase)

    def read(array, number):
        for _ in range(2):  # at its beginning and at its end
            last = number, shared.slots - 1
            assert shared.data[array][number % shared.stages] == [last] * WARPS
            yield IDLE

    def release(array, number, count):
        shared.empty[array][number % shared.stages].arrive(count)

    def meet():
        nonlocal meetings
        shared.turns_ended.arrive()
        number, meetings = meetings, meetings + 1
        yield lambda: shared.turns_ended.phase > number

    def last_block(blocks, of):
        return passed + blocks - 1 - (blocks - 1 - of) % 2

    for blocks, takes_turns in parts:
        turns = 2 if takes_turns else 1
        knows_next = shared.fault == "early" or shared.stages > (2 if shared.consumers == 2 else 1)
        numbers = range(passed + warpgroup * takes_turns, passed + blocks, turns)
        joins = takes_turns and blocks > 1
        for i, number in enumerate(numbers):
            if i > 0:
                yield from wait("v", numbers[i - 1])
            yield from wait("k", number)
            yield from read("k", number)
            release("k", number, turns)
            if i > 0 and not knows_next:
                yield from read("v", numbers[i - 1])
                release("v", numbers[i - 1], turns)
            if has_factors:
                yield from wait("v", number)
                yield from read("v", number)
            if i > 0 and knows_next:
                yield from read("v", numbers[i - 1])
                release("v", numbers[i - 1], turns)
        if numbers:
            yield from wait("v", numbers[-1])
            yield from read("v", numbers[-1])
            if not joins:
                release("v", numbers[-1], turns)
        if joins:
            own, other = (last_block(blocks, of) for of in (warpgroup, 1 - warpgroup))
            yield from meet()
            shared.data["v"][own % shared.stages][warp] = ("O", own)
            yield from meet()
            assert shared.data["v"][other % shared.stages][warp] == ("O", other)
            yield IDLE
            release("v", other, 2)
        elif takes_turns and blocks > 0 and shared.fault != "no meeting":
            yield from meet()
        passed += blocks


def simulate(seed, fault=None):
    chance = random.Random(seed)
    stages = {"alternate": 3, "early": 2}.get(fault) or chance.choice((2, 3, 4))
    # Of four warpgroups: two consumers and a producer each of K and V, or three and one of both.
    consumers = 2 if fault in ("alternate", "early", "no meeting") else chance.choice((2, 2, 3))
    slots = 1 if consumers == 3 else chance.choice((1, 2))
    shared = Shared(stages, chance.choice((1, 3, 4, 5)), slots, consumers, fault)
    parts = [
        (chance.choice((0, 1, 1, 2, 3, 4, 7, 12)), consumers == 2 and chance.random() < 0.6)
        for _ in range(chance.randrange(1, 9))
    ]
    blocks = sum(count for count, _ in parts)
    if fault == "alternate":  # two warpgroups have every other block of either
        work = [(array, range(of, blocks, 2)) for array in "kv" for of in (0, 1)]
    else:
        work = [(arrays, range(blocks)) for arrays in (("k", "v") if consumers == 2 else ("kv",))]
    processes = [
        producer(shared, arrays, warp, numbers) for arrays, numbers in work for warp in range(WARPS)
    ]
    has_factors = fault == "early" or chance.random() < 0.5
    processes += [
        consumer(shared, warpgroup, warp, parts, has_factors)
        for warpgroup in range(consumers)
        for warp in range(WARPS)
    ]
    run_warps(dict(enumerate(processes)), chance)


@pytest.mark.parametrize("seed", range(300))
def test_every_block_is_read_as_it_was_written(seed):
    simulate(seed)


@pytest.mark.parametrize("fault", ["full", "late", "no meeting", "alternate", "early"])
def test_faults_are_found(fault):
    """A stage that is written before it is free; a copy that is read before it has landed;
    warpgroups that do not meet behind a part of one block; producers that have every other block of
    three stages, so that each of them misses phases; the next block's factors of V asked for before
    this one's V is free, where both have one stage."""

    def is_found(seed):
        try:
            simulate(seed, fault)
        except AssertionError:
            return True
        return False

    assert any(is_found(seed) for seed in range(2000))
