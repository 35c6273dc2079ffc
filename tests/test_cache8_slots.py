"""Who waits for whom in the kernels of caches of 8 bits and many rows (mainloop.hpp, turns.hpp and
fp8_wide_load.hpp in attention/decode), as test_cache8_protocol.py, where blocks are in slots, what
is copied lands at any time, factors of the next V are asked for before this one is read, and
consumers are three warpgroups and meet for NaN of V. Nothing here needs a GPU."""

import random
from collections import deque
from dataclasses import dataclass

import pytest

WARPS = 4  # of a warpgroup
IDLE = object()


@dataclass
class Kernel:
    stages: int
    staged: int  # slots of 8 bits
    slots: int = 1  # of a block
    consumers: int = 2  # warpgroups; of three there is one producer, of two one for K, one for V


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
    def __init__(self, kernel, fault):
        self.kernel, self.fault = kernel, fault
        stages, consumers = range(kernel.stages), kernel.consumers * WARPS
        self.full = {x: [Barrier(WARPS) for _ in stages] for x in "kv"}
        self.empty = {x: [Barrier(consumers) for _ in stages] for x in "kv"}
        self.data = {
            x: [[[None] * kernel.slots for _ in range(WARPS)] for _ in stages] for x in "kv"
        }
        self.readers = {x: [0 for _ in stages] for x in "kv"}
        self.turns_ended = Barrier(2 * WARPS)
        self.guards = [Barrier(2 * WARPS if kernel.consumers == 2 else consumers)]


class Copies:
    """Of a producer warp: groups of copies, which land in their order."""

    def __init__(self):
        self.committed = self.landed = 0
        self.on_their_way = deque()

    def commit(self, slot=None, what=None):
        self.committed += 1
        self.on_their_way.append((slot, what))

    def land(self):
        slot, what = self.on_their_way.popleft()
        if slot is not None:
            slot[0] = what
        self.landed += 1


def loader(shared, copies, array, warp, groups_of_all, numbers):
    """Of these blocks of K or of V: what a producer warp does."""
    kernel = shared.kernel
    staged = [[None] for _ in range(kernel.staged)]
    state = {"next": 0, "oldest": 0, "count": 0, "block": 0, "slot": 0}

    def convert():
        but = groups_of_all * kernel.staged - (0 if shared.fault == "late" else 1)
        yield lambda: copies.committed - copies.landed <= but
        number, slot = numbers[state["block"]], state["slot"]
        assert staged[state["oldest"]][0] == (number, slot), "a copy is read that has not landed"
        stage, phase = number % kernel.stages, number // kernel.stages
        if slot == 0 and shared.fault != "full":
            yield lambda: shared.empty[array][stage].has_ended(phase - 1)
        assert shared.readers[array][stage] == 0, "written while it is read"
        shared.data[array][stage][warp][slot] = number
        yield IDLE
        state["oldest"] = (state["oldest"] + 1) % kernel.staged
        state["count"] -= 1
        last = 0 if shared.fault == "half" else kernel.slots - 1
        if slot == last:
            shared.full[array][stage].arrive()
        state["slot"] = (slot + 1) % kernel.slots
        state["block"] += state["slot"] == 0

    def copy(number):
        for slot in range(kernel.slots):
            if state["count"] == kernel.staged:
                yield from convert()
            staged[state["next"]][0] = None
            copies.commit(staged[state["next"]], (number, slot))
            state["next"] = (state["next"] + 1) % kernel.staged
            state["count"] += 1

    def fill_groups():
        for _ in range(state["count"], kernel.staged):
            copies.commit()

    def convert_next():
        yield from convert()
        copies.commit()

    return copy, fill_groups, convert_next, lambda: state["count"] > 0


def producer(shared, copies, arrays, warp, numbers):
    loaders = [loader(shared, copies, array, warp, len(arrays), numbers) for array in arrays]
    for number in numbers:
        for copy, *_ in loaders:
            yield from copy(number)
    for _, fill_groups, *_ in loaders:
        fill_groups()
    while loaders[0][3]():
        for _, _, convert_next, _ in loaders:
            yield from convert_next()


def consumer(shared, warpgroup, warp, parts, has_factors):
    """`parts`: blocks, whether warpgroups take turns, blocks that all meet at for NaN of V."""
    kernel = shared.kernel
    passed = 0
    meetings = {}

    def wait(array, number):
        stage, phase = number % kernel.stages, number // kernel.stages
        yield lambda: shared.full[array][stage].has_ended(phase)

    def check(array, number):
        found = shared.data[array][number % kernel.stages]
        assert found == [[number] * kernel.slots] * WARPS, f"{found} for {number}"

    def read(array, number):
        check(array, number)
        shared.readers[array][number % kernel.stages] += 1
        yield IDLE
        shared.readers[array][number % kernel.stages] -= 1
        check(array, number)

    def release(array, number, count):
        shared.empty[array][number % kernel.stages].arrive(count)

    def meet(barrier):
        barrier.arrive()
        meetings[barrier] = number = meetings.get(barrier, 0) + 1
        yield lambda: barrier.phase >= number

    def last_block(blocks, of):
        return passed + blocks - 1 - (blocks - 1 - of) % 2

    for blocks, takes_turns, guarded in parts:
        turns = 2 if takes_turns else 1
        numbers = range(passed + warpgroup * takes_turns, passed + blocks, turns)
        joins = takes_turns and blocks > 1
        knows_next = (
            kernel.stages > (2 if kernel.consumers == 2 else 1)
            or shared.fault == "next of all stages"
        )

        def wait_for_values(number, takes_turns=takes_turns, guarded=guarded):
            yield from wait("v", number)
            if number in guarded and not takes_turns:
                yield from read("v", number)
                yield from meet(shared.guards[0])

        def factors(number):
            if has_factors:
                yield from wait("v", number)
                yield from read("v", number)

        before = None
        for number in numbers:
            if before is not None:
                yield from wait_for_values(before)
            yield from wait("k", number)
            yield from read("k", number)
            release("k", number, turns)
            if before is None:
                yield from factors(number)
            else:
                if not knows_next:
                    yield from read("v", before)
                    release("v", before, turns)
                yield from factors(number)
                if knows_next:
                    yield from read("v", before)
                    release("v", before, turns)
            before = number
        if numbers:
            yield from wait_for_values(numbers[-1])
            yield from read("v", numbers[-1])
            if not joins:
                release("v", numbers[-1], turns)
        if joins:
            own, other = (last_block(blocks, of) for of in (warpgroup, 1 - warpgroup))
            yield from meet(shared.turns_ended)
            shared.data["v"][own % kernel.stages][warp][0] = ("O", own)
            yield from meet(shared.turns_ended)
            assert shared.data["v"][other % kernel.stages][warp][0] == ("O", other)
            yield IDLE
            release("v", other, 2)
        elif takes_turns and blocks > 0 and shared.fault != "no meeting":
            yield from meet(shared.turns_ended)
        passed += blocks


def run(processes, copies, chance):
    """Some are slow for a while, copies too."""
    waits = {}
    live = dict(enumerate(processes))
    weights = {}
    while live:
        if not weights or chance.random() < 0.02:
            names = [*range(len(processes)), *(("copy", i) for i in range(len(copies)))]
            weights = {name: chance.choice((0.01, 1, 1, 4)) for name in names}
        ready = [i for i in live if i not in waits or waits[i]()]
        ready += [("copy", i) for i, own in enumerate(copies) if own.on_their_way]
        assert ready, "all wait"
        (i,) = chance.choices(ready, [weights[i] for i in ready])
        if isinstance(i, tuple):
            copies[i[1]].land()
            continue
        waits.pop(i, None)
        try:
            waited_for = next(live[i])
        except StopIteration:
            del live[i]
            continue
        if waited_for is not IDLE:
            waits[i] = waited_for


def simulate(kernel, seed, fault=None):
    chance = random.Random(seed)
    shared = Shared(kernel, fault)
    parts, blocks = [], 0
    for _ in range(chance.randrange(1, 9)):
        count = chance.choice((0, 1, 1, 2, 3, 4, 7, 12))
        guarded = {blocks + i for i in range(count) if chance.random() < 0.3}
        parts.append((count, kernel.consumers == 2 and chance.random() < 0.6, guarded))
        blocks += count
    producers = [(x, range(blocks)) for x in (("k", "v") if kernel.consumers == 2 else ("kv",))]
    if fault == "alternate":  # two warpgroups have every other block of either
        producers = [(x, range(of, blocks, 2)) for x in "kv" for of in (0, 1)]
    copies = [Copies() for _ in range(len(producers) * WARPS)]
    processes = [
        producer(shared, copies[i * WARPS + warp], arrays, warp, numbers)
        for i, (arrays, numbers) in enumerate(producers)
        for warp in range(WARPS)
    ]
    has_factors = chance.random() < 0.5 or fault == "next of all stages"
    processes += [
        consumer(shared, warpgroup, warp, parts, has_factors)
        for warpgroup in range(kernel.consumers)
        for warp in range(WARPS)
    ]
    run(processes, copies, chance)


# Of the table's rows, and other rings.
KERNELS = [
    *(Kernel(3, 5), Kernel(3, 3, slots=2), Kernel(2, 5), Kernel(3, 4, consumers=3)),
    *(Kernel(2, 1), Kernel(4, 3), Kernel(2, 3, slots=2), Kernel(3, 1, slots=2)),
    *(Kernel(4, 1, consumers=3), Kernel(3, 5, slots=3)),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_block_is_read_as_it_was_written(kernel):
    for seed in range(60):
        simulate(kernel, seed)


FAULTS = {
    "full": Kernel(3, 5),
    "late": Kernel(3, 5),
    "no meeting": Kernel(3, 5),
    "half": Kernel(3, 3, slots=2),
    "next of all stages": Kernel(2, 5),
    "alternate": Kernel(3, 3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    """A stage that is written before it is free; a copy that is read before it has landed;
    warpgroups that do not meet behind a part of one block; a stage that is full when the first slot
    of its block is there; factors of the next V that wait for the stage of this one; producers that
    have every other block of three stages, so that each of them misses phases."""

    def is_found(seed):
        try:
            simulate(FAULTS[fault], seed, fault)
        except AssertionError:
            return True
        return False

    assert any(is_found(seed) for seed in range(500))
