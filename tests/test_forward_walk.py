"""The walk over a tile's blocks of keys (attention/forward/protocol.hpp and mainloop.hpp), played
with the ranges of attention/ranges.hpp: the producer and all warpgroups come to the end whoever
runs first, and each finds the blocks that it expects. Nothing here needs a GPU."""

import random

import pytest
from host_program import host_program, needs_cxx

pytestmark = needs_cxx

WARPGROUP_M = 64
WARPS = 4  # of a warpgroup
NONE = -1000  # a mask's field without a value
MAIN = f"""
#include <iostream>
#include "cute_kernels/attention/ranges.hpp"
using namespace cute_kernels::attention;

template <class Ranges>
void print_tiles(Ranges const& ranges, int tile_m, int tile_n) {{
  int const tiles = (ranges.seqlen_q + tile_m - 1) / tile_m;
  for (int tile = 0; tile < tiles; ++tile) {{
    int const first = first_query_of_tile(ranges.seqlen_q, tile_m, tiles, tile);
    BlockRange const all = ranges.key_blocks(first, tile_m, tile_n);
    std::cout << all.begin << ' ' << all.end << ' ';
    for (int query = first; query < first + tile_m; query += {WARPGROUP_M}) {{
      BlockRange const own = ranges.key_blocks_of(all, query, {WARPGROUP_M}, tile_n);
      std::cout << own.begin << ' ' << own.end << ' ';
    }}
  }}
  std::cout << '\\n';
}}

int main() {{
  AttentionCall call{{}};
  int diagonal, left, right, tile_m, tile_n;
  auto field = [](int value) {{
    return value == {NONE} ? std::nullopt : std::optional<int>(value);
  }};
  while (std::cin >> call.sizes.seqlen_q >> call.sizes.seqlen_k >> diagonal >> left >> right >>
         tile_m >> tile_n) {{
    call.mask = {{field(diagonal), field(left), field(right)}};
    print_tiles(WindowRanges(call), tile_m, tile_n);
    if (auto const ranges = kernel_ranges(call)) {{
      print_tiles(*ranges, tile_m, tile_n);
    }} else {{
      std::cout << '\\n';
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def tiles_of(tmp_path_factory):
    """Of each case the tiles, of kernels for any call and, if they read the mask, of those for
    dense ones: for the producer and for each warpgroup a range of blocks."""
    program = host_program(tmp_path_factory.mktemp("walk"), MAIN)

    def run(cases):
        lines = program(cases)
        answers = []
        for case, pair in zip(cases, zip(lines[::2], lines[1::2], strict=True), strict=True):
            roles = 1 + case[5] // WARPGROUP_M
            answers.append([split(line, 2 * roles) for line in pair if line])
        return answers

    return run


def split(line, size):
    pairs = list(zip(line[::2], line[1::2], strict=True))
    return [pairs[i : i + size // 2] for i in range(0, len(pairs), size // 2)]


class Pipeline:
    """Blocks in the order in which they are loaded, and how many each reader has released."""

    def __init__(self, stages, readers):
        self.stages, self.loaded, self.released = stages, [], [0] * readers

    def load(self, block):
        yield lambda: len(self.loaded) - min(self.released) < self.stages
        self.loaded.append(block)

    def wait(self, reader, place, block):
        yield lambda: len(self.loaded) > place
        assert self.loaded[place] == block


class Meeting:
    """A named barrier."""

    def __init__(self, warps):
        self.warps, self.there, self.times = warps, set(), 0

    def arrive(self, warp):
        assert warp not in self.there, "a named barrier holds one arrival of a warp"
        self.there.add(warp)
        if len(self.there) == self.warps:
            self.there, self.times = set(), self.times + 1

    def sync(self, warp):
        times = self.times
        self.arrive(warp)
        yield lambda: self.times > times


class Play:
    """Each role, the producer and the warps of all warpgroups, is a generator of what it waits
    for. Either O has memory of its own (`separate`), so that each warp tells when it is done with
    Q, or one warp tells for its warpgroup behind O's store, where a warpgroup without rows in a
    tile meets, too (`meets`). Q's barriers have phases of which waiters know the parity alone."""

    def __init__(self, tiles, stages, warpgroups, separate=True, meets=True):
        self.tiles, self.warpgroups = tiles, warpgroups
        self.separate, self.meets = separate, meets
        readers = warpgroups * WARPS
        self.k, self.v = Pipeline(stages, readers), Pipeline(stages, readers)
        self.queries = [0] * warpgroups  # tiles whose Q is there
        self.queries_released = [0] * warpgroups
        self.turns = [Meeting(2 * WARPS) for _ in range(warpgroups)]
        self.outputs = [Meeting(WARPS) for _ in range(warpgroups)]
        self.computed = [[] for _ in range(readers)]

    def producer(self):
        releases = WARPS if self.separate else 1
        for number, ((begin, end), *_) in enumerate(self.tiles):
            block = end - 1
            if block >= begin:
                yield from self.k.load((number, block))
            for i in range(self.warpgroups):
                yield lambda i=i, n=number: self.queries_released[i] == n * releases
                self.queries[i] += 1
            while block > begin:
                yield from self.k.load((number, block - 1))
                yield from self.v.load((number, block))
                block -= 1
            if block == begin:
                yield from self.v.load((number, block))

    def pass_turn(self, i, warp):
        self.turns[(i + 1) % self.warpgroups].arrive(warp)

    def turn(self, i, warp):
        yield from self.turns[i].sync(warp)
        self.pass_turn(i, warp)

    def end_tile(self, i, warp, has_rows):
        if self.separate:
            return
        if has_rows or self.meets:
            yield from self.outputs[i].sync(warp)
        if warp % WARPS == 0:
            self.queries_released[i] += 1

    def warp(self, warp):
        k, v, i = self.k, self.v, warp // WARPS
        if self.warpgroups > 1 and i == self.warpgroups - 1:
            self.pass_turn(i, warp)
        turn = self.turn if self.warpgroups > 1 else lambda *_: ()
        for number, ((first, end), *owns) in enumerate(self.tiles):
            begin, own_end = owns[i]
            yield lambda number=number: self.queries[i] % 2 != number % 2
            assert self.queries[i] == number + 1
            block = end - 1
            while block >= own_end:  # skip_blocks
                yield from k.wait(warp, k.released[warp], (number, block))
                k.released[warp] += 1
                yield from v.wait(warp, v.released[warp], (number, block))
                v.released[warp] += 1
                if block > first:
                    yield from turn(i, warp)
                block -= 1
            if block < begin:
                self.queries_released[i] += self.separate
                yield from self.end_tile(i, warp, has_rows=False)
                continue
            yield from k.wait(warp, k.released[warp], (number, block))
            k.released[warp] += 1
            while block > begin:
                block -= 1
                yield from k.wait(warp, k.released[warp], (number, block))
                if self.warpgroups > 1:
                    yield from self.turns[i].sync(warp)
                yield from v.wait(warp, v.released[warp], (number, block + 1))
                self.computed[warp].append((number, block + 1))
                if self.warpgroups > 1:
                    self.pass_turn(i, warp)
                k.released[warp] += 1
                v.released[warp] += 1
            self.queries_released[i] += self.separate
            yield from v.wait(warp, v.released[warp], (number, block))
            self.computed[warp].append((number, block))
            v.released[warp] += 1
            for skipped in range(block - 1, first - 1, -1):  # skip_last_blocks
                yield from k.wait(warp, k.released[warp], (number, skipped))
                k.released[warp] += 1
                yield from turn(i, warp)
                yield from v.wait(warp, v.released[warp], (number, skipped))
                v.released[warp] += 1
            yield from self.end_tile(i, warp, has_rows=True)

    def run(self, rng):
        roles = [self.producer(), *(self.warp(i) for i in range(self.warpgroups * WARPS))]
        haste = {role: rng.choice([1.0, 1.0, 0.1, 0.01]) for role in roles}
        waits = {role: next(role, None) for role in roles}
        while waits := {role: wait for role, wait in waits.items() if wait is not None}:
            ready = [role for role, wait in waits.items() if wait()]
            assert ready, "all wait for one another"
            (role,) = rng.choices(ready, [haste[role] for role in ready])
            waits[role] = next(role, None)


def random_case(rng):
    seqlen_q, seqlen_k = rng.randint(1, 700), rng.choice([0, 1, rng.randint(2, 900)])
    diagonal = rng.choice([NONE, NONE, 0, rng.randint(-500, 700)])
    left = rng.choice([NONE, 0, rng.randint(0, 200), rng.randint(0, 900)])
    right = rng.choice([NONE, 0, 0, rng.randint(0, 200)])
    tile_m, tile_n = WARPGROUP_M * rng.randint(1, 4), rng.choice([16, 64, 80, 128])
    return seqlen_q, seqlen_k, diagonal, left, right, tile_m, tile_n


def seen(case, tile, tiles, i):
    """The blocks of the keys that a warpgroup's queries see."""
    seqlen_q, seqlen_k, diagonal, left, right, tile_m, tile_n = case
    at = seqlen_k - seqlen_q if diagonal == NONE else diagonal
    start = -(-seqlen_q // WARPGROUP_M) * WARPGROUP_M - (tiles - tile) * tile_m + i * WARPGROUP_M
    keys = set()
    for query in range(max(0, start), min(start + WARPGROUP_M, seqlen_q)):
        first = 0 if left == NONE else max(0, query + at - left)
        end = seqlen_k if right == NONE else min(seqlen_k, query + at + right + 1)
        if end > first:
            keys |= {first // tile_n, (end - 1) // tile_n}
    return list(range(max(keys), min(keys) - 1, -1)) if keys else []


def test_all_come_to_the_end_and_compute_what_is_seen(tiles_of):
    rng = random.Random(7)
    cases = [random_case(rng) for _ in range(400)]
    dense = skipping = 0
    for case, kinds in zip(cases, tiles_of(cases), strict=True):
        dense += len(kinds) > 1
        for tiles in kinds:
            warpgroups = case[5] // WARPGROUP_M
            play = Play(tiles, rng.choice([1, 2, 3]), warpgroups, separate=rng.random() < 0.5)
            play.run(rng)
            for i in range(warpgroups):
                expected = [
                    (number, block)
                    for number in range(len(tiles))
                    for block in seen(case, number, len(tiles), i)
                ]
                assert play.computed[WARPS * i : WARPS * (i + 1)] == [expected] * WARPS, case
                owns = [tile[1 + i] for tile in tiles]
                skipping += any(own[0] > tile[0][0] for own, tile in zip(owns, tiles, strict=True))
    assert dense > 20
    assert skipping > 50


@pytest.mark.parametrize("separate", [True, False])
def test_warps_of_a_warpgroup_without_rows_do_not_part(tiles_of, separate):
    """Where a warp could be two tiles behind the one that tells for it, it would never hear of its
    own: heads of few queries and keys, whose tiles nothing but Q's barriers holds together."""
    rng = random.Random(8)
    cases = [
        (rng.randint(1, 64), rng.randint(1, 64), NONE, NONE, rng.choice([NONE, 0]), 128, 64)
        for _ in range(40)
    ]
    parted = 0
    for kinds in tiles_of(cases):
        for (tile,) in kinds:
            assert tile[1][0] == tile[1][1]
            Play([tile] * 6, 2, 2, separate).run(rng)
            try:
                Play([tile] * 6, 2, 2, separate, meets=False).run(rng)
            except AssertionError:
                parted += 1
    assert parted == 0 if separate else parted > 3
