"""When a part's queries are copied (attention/decode/load.hpp): a model of producer and consumer
warpgroups at their barriers, in random order. Nothing here needs a GPU."""

import random
from collections import deque

import pytest

CONSUMERS = 2


class Barrier:
    """Of one phase's arrivals; waits see one bit of its number."""

    def __init__(self, count):
        self.count = self.pending = count
        self.phase = 0

    def arrive(self, count=1):
        self.pending -= count
        assert self.pending >= 0, "more arrivals than a phase has"
        if self.pending == 0:
            self.pending = self.count
            self.phase += 1

    def passed(self, parity):
        return self.phase % 2 != parity


class Place:
    """Shared memory that copies fill and products read: at a time either."""

    def __init__(self):
        self.holds = None
        self.readers = 0

    def start_copy(self):
        assert self.readers == 0, "copied over while it is read"
        self.holds = None

    def read(self, expected):
        assert self.holds == expected, f"{self.holds} for {expected}"
        self.readers += 1

    def end_read(self):
        self.readers -= 1


class Model:
    """`parts`: (blocks, whether warpgroups take turns). `ahead`: blocks before the queries."""

    def __init__(self, parts, stages, ahead, planted=None):
        self.parts, self.stages, self.ahead, self.planted = parts, stages, ahead, planted
        self.full = {x: [Barrier(1) for _ in range(stages)] for x in "kv"}
        self.empty = {x: [Barrier(CONSUMERS) for _ in range(stages)] for x in "kv"}
        self.places = {x: [Place() for _ in range(stages)] for x in "kv"}
        self.q_full, self.q_empty, self.q = Barrier(1), Barrier(CONSUMERS), Place()
        self.copies = deque()  # they land in their order
        self.met = [0] * CONSUMERS
        self.answers = 0

    def meeting(self, warpgroup):
        self.met[warpgroup] += 1
        goal = self.met[warpgroup]
        return lambda: self.met[1 - warpgroup] >= goal

    def copy(self, place, what, barrier):
        place.start_copy()
        self.copies.append((place, what, barrier))

    def land(self):
        place, what, barrier = self.copies.popleft()
        place.holds = what
        barrier.arrive()

    def producer(self):
        passed = q_phase = 0
        for part, (blocks, _) in enumerate(self.parts):
            late = passed > 0 and blocks > self.ahead
            prepared = self.ahead if late else 0
            if self.planted == "behind all keys":
                prepared = blocks - 1
            for block in range(blocks):
                if block == prepared:
                    if self.planted != "does not wait":
                        yield lambda phase=q_phase: self.q_empty.passed(phase ^ 1)
                    self.copy(self.q, part, self.q_full)
                    q_phase ^= 1
                number = passed + block
                stage, phase = number % self.stages, number // self.stages % 2
                for x in "kv":
                    yield lambda x=x, s=stage, p=phase: self.empty[x][s].passed(p ^ 1)
                    self.copy(self.places[x][stage], (part, block), self.full[x][stage])
            passed += blocks

    def consumer(self, warpgroup):
        passed = q_phase = 0
        for part, (blocks, takes_turns) in enumerate(self.parts):
            turns = CONSUMERS if takes_turns else 1
            yield lambda phase=q_phase: self.q_full.passed(phase)
            q_phase ^= 1
            yield from self.compute(warpgroup, part, blocks, passed, turns)
            self.answers += 1
            passed += blocks

    def compute(self, warpgroup, part, blocks, passed, turns):
        own = range(warpgroup if turns > 1 else 0, blocks, turns)
        if not own:
            self.q_empty.arrive()

        def wait(x, block):
            number = passed + block
            barrier = self.full[x][number % self.stages]
            return lambda: barrier.passed(number // self.stages % 2)

        def place(x, block):
            return self.places[x][(passed + block) % self.stages]

        def release(x, block):
            self.empty[x][(passed + block) % self.stages].arrive(turns)

        before = None
        for block in own:
            if before is not None:
                yield wait("v", before)
            yield wait("k", block)
            self.q.read(part)
            place("k", block).read((part, block))
            if before is not None:
                place("v", before).read((part, before))
            yield lambda: True
            self.q.end_read()
            place("k", block).end_read()
            release("k", block)
            if block == own[-1]:
                self.q_empty.arrive()
            yield lambda: True
            if before is not None:
                place("v", before).end_read()
                release("v", before)
            before = block
        joins = turns > 1 and blocks > 1
        if own:
            yield wait("v", before)
            place("v", before).read((part, before))
            yield lambda: True
            place("v", before).end_read()
            if not joins or self.planted == "free too soon":
                release("v", before)
        if joins:
            yield self.meeting(warpgroup)
            # O goes through the stage, whose reader frees it.
            mine, others = sorted([blocks - 1, blocks - 2], key=lambda x: x != before)
            assert place("v", mine).holds == (part, mine)
            place("v", mine).holds = ("O", part, warpgroup)
            yield self.meeting(warpgroup)
            assert place("v", others).holds == ("O", part, 1 - warpgroup)
            if self.planted != "free too soon":
                release("v", others)

    def run(self, seed):
        order = random.Random(seed)
        agents = [self.producer(), *(self.consumer(i) for i in range(CONSUMERS))]
        waits = [lambda: True] * len(agents)
        while agents or self.copies:
            ready = [i for i, wait in enumerate(waits) if wait()]
            choices = ready + ([-1] if self.copies else [])
            assert choices, "all wait for one another"
            chosen = order.choice(choices)
            if chosen < 0:
                self.land()
                continue
            try:
                waits[chosen] = next(agents[chosen])
            except StopIteration:
                del agents[chosen], waits[chosen]


def some_parts(order):
    return [
        (order.choice([1, 1, 2, 3, 4, 5, 7, 12]), order.random() < 0.5)
        for _ in range(order.randint(1, 8))
    ]


# Stages, and the blocks of kAhead look-ups, at head dims 128 (few rows and many) and 256.
RINGS = [(6, 2), (3, 2), (5, 4)]


@pytest.mark.parametrize(("stages", "ahead"), RINGS)
def test_queries_behind_the_first_keys_neither_hang_nor_are_read_too_soon(stages, ahead):
    for seed in range(400):
        parts = some_parts(random.Random(seed))
        model = Model(parts, stages, ahead)
        model.run(seed)
        assert model.answers >= len(parts)


@pytest.mark.parametrize("planted", ["behind all keys", "does not wait", "free too soon"])
def test_the_model_finds_errors(planted):
    failures = 0
    for seed in range(400):
        parts = some_parts(random.Random(seed))
        try:
            Model(parts, 3, 2, planted).run(seed)
        except AssertionError:
            failures += 1
    assert failures > 0
