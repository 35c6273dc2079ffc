"""Who waits for whom in the kernel of a cache of 8 bits and many rows (mainloop.hpp, turns.hpp and
fp8_wide_load.hpp in attention/decode): every warp a process, in any order, barriers as the hardware
has them, of whose phase a bit is known. Nothing here needs a GPU."""

import random

import pytest

WARPS = 4  # of a warpgroup
CONSUMERS = 2  # warpgroups
IDLE = object()


class Barrier:
    """An mbarrier."""

    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.phase = 0

    def arrive(self, count=1):
        self.pending -= count
        assert self.pending >= 0, "more arrivals than a phase has"
        if self.pending == 0:
            self.pending, self.phase = self.arrivals, self.phase + 1

    def has_ended(self, phase):
        """What a wait for the phase's parity sees."""
        return (self.phase - 1) % 2 == phase % 2


class Shared:
    def __init__(self, stages, staged, fault):
        self.stages, self.staged, self.fault = stages, staged, fault
        self.full = {x: [Barrier(WARPS) for _ in range(stages)] for x in "kv"}
        self.empty = {x: [Barrier(CONSUMERS * WARPS) for _ in range(stages)] for x in "kv"}
        self.data = {x: [[None] * WARPS for _ in range(stages)] for x in "kv"}
        self.turns_ended = Barrier(CONSUMERS * WARPS)
        self.handed = {}


def producer(shared, array, warp, blocks, own=lambda number: True):
    """`own`: which blocks are this one's."""
    groups, slots = 0, [None] * shared.staged

    def convert(number):
        # All groups but the last so many have landed.
        ahead = shared.staged - (0 if shared.fault == "late" else 1)
        assert numbers.index(number) < groups - ahead, "a copy is read before it has landed"
        assert slots[numbers.index(number) % shared.staged] == number
        stage, phase = number % shared.stages, number // shared.stages
        if shared.fault != "full":
            yield lambda: shared.empty[array][stage].has_ended(phase - 1)
        yield IDLE
        shared.data[array][stage][warp] = number
        yield IDLE
        shared.full[array][stage].arrive()

    numbers = [number for number in range(blocks) if own(number)]
    for i, number in enumerate(numbers):
        if i >= shared.staged:
            yield from convert(numbers[i - shared.staged])
        slots[i % shared.staged] = number
        groups += 1
    first = max(0, len(numbers) - shared.staged)
    groups += shared.staged - (len(numbers) - first)
    for number in numbers[first:]:
        yield from convert(number)
        groups += 1


def consumer(shared, warpgroup, warp, parts, has_factors):
    """`parts`: (blocks, whether warpgroups take turns) of each part."""
    passed = meetings = 0

    def wait(array, number):
        stage, phase = number % shared.stages, number // shared.stages
        yield lambda: shared.full[array][stage].has_ended(phase)

    def read(array, number):
        for _ in range(2):  # at its beginning and at its end
            assert shared.data[array][number % shared.stages] == [number] * WARPS
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
        turns = CONSUMERS if takes_turns else 1
        numbers = range(passed + warpgroup * takes_turns, passed + blocks, turns)
        joins = takes_turns and blocks > 1
        for i, number in enumerate(numbers):
            if i > 0:
                yield from wait("v", numbers[i - 1])
            yield from wait("k", number)
            yield from read("k", number)
            release("k", number, turns)
            if i > 0:
                yield from read("v", numbers[i - 1])
                release("v", numbers[i - 1], turns)
            if has_factors:
                yield from wait("v", number)
                yield from read("v", number)
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
            release("v", other, CONSUMERS)
        elif takes_turns and blocks > 0 and shared.fault != "no meeting":
            yield from meet()
        passed += blocks


def run(processes, chance):
    """Some are slow for a while."""
    waits = {}
    live = dict(enumerate(processes))
    weights = {}
    while live:
        if not weights or chance.random() < 0.02:
            weights = {i: chance.choice((0.01, 1, 1, 4)) for i in live}
        ready = [i for i in live if i not in waits or waits[i]()]
        assert ready, "all wait"
        (i,) = chance.choices(ready, [weights[i] for i in ready])
        waits.pop(i, None)
        try:
            waited_for = next(live[i])
        except StopIteration:
            del live[i]
            weights.pop(i, None)
            continue
        if waited_for is not IDLE:
            waits[i] = waited_for


def simulate(seed, fault=None):
    chance = random.Random(seed)
    stages = 3 if fault == "alternate" else chance.choice((2, 3, 4))
    shared = Shared(stages, chance.choice((1, 3, 5)), fault)
    parts = [
        (chance.choice((0, 1, 1, 2, 3, 4, 7, 12)), chance.random() < 0.6)
        for _ in range(chance.randrange(1, 9))
    ]
    blocks = sum(count for count, _ in parts)
    if fault == "alternate":  # two warpgroups have every other block of either
        processes = [
            producer(shared, array, warp, blocks, lambda number, of=of: number % 2 == of)
            for array in "kv"
            for of in (0, 1)
            for warp in range(WARPS)
        ]
    else:
        processes = [
            producer(shared, array, warp, blocks) for array in "kv" for warp in range(WARPS)
        ]
    has_factors = chance.random() < 0.5
    processes += [
        consumer(shared, warpgroup, warp, parts, has_factors)
        for warpgroup in range(CONSUMERS)
        for warp in range(WARPS)
    ]
    run(processes, chance)


@pytest.mark.parametrize("seed", range(300))
def test_every_block_is_read_as_it_was_written(seed):
    simulate(seed)


@pytest.mark.parametrize("fault", ["full", "late", "no meeting", "alternate"])
def test_faults_are_found(fault):
    """A stage that is written before it is free; a copy that is read before it has landed;
    warpgroups that do not meet behind a part of one block; producers that have every other block of
    three stages, so that each of them misses phases."""

    def is_found(seed):
        try:
            simulate(seed, fault)
        except AssertionError:
            return True
        return False

    assert any(is_found(seed) for seed in range(2000))
