"""The walk over a tile's blocks of keys (attention/forward/protocol.hpp and mainloop.hpp), played
with the ranges of attention/ranges.hpp: the producer and all warpgroups come to the end whoever
runs first, and each finds the blocks that it expects. Nothing here needs a GPU."""

import random

import pytest
from host_program import host_program, needs_cxx

pytestmark = needs_cxx

WARPGROUP_M = 64
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


class Play:
    """Each role is a generator of what it waits for."""

    def __init__(self, tiles, stages, warpgroups):
        self.tiles, self.warpgroups = tiles, warpgroups
        self.k, self.v = Pipeline(stages, warpgroups), Pipeline(stages, warpgroups)
        self.queries = 0  # tiles whose Q is there
        self.queries_released = [0] * warpgroups
        self.turns = [1] + [0] * (warpgroups - 1)
        self.computed = [[] for _ in range(warpgroups)]

    def producer(self):
        for number, ((begin, end), *_) in enumerate(self.tiles):
            block = end - 1
            if block >= begin:
                yield from self.k.load((number, block))
            yield lambda number=number: min(self.queries_released) == number
            self.queries += 1
            while block > begin:
                yield from self.k.load((number, block - 1))
                yield from self.v.load((number, block))
                block -= 1
            if block == begin:
                yield from self.v.load((number, block))

    def turn(self, i):
        yield lambda: self.turns[i]
        self.turns[i] -= 1
        following = (i + 1) % self.warpgroups
        assert self.turns[following] == 0  # a named barrier holds one arrival
        self.turns[following] += 1

    def warpgroup(self, i):
        k, v = self.k, self.v
        for number, ((first, end), *owns) in enumerate(self.tiles):
            begin, own_end = owns[i]
            yield lambda number=number: self.queries > number
            block = end - 1
            while block >= own_end:  # skip_blocks
                yield from k.wait(i, k.released[i], (number, block))
                k.released[i] += 1
                yield from v.wait(i, v.released[i], (number, block))
                v.released[i] += 1
                if block > first:
                    yield from self.turn(i)
                block -= 1
            if block < begin:
                self.queries_released[i] += 1
                continue
            yield from k.wait(i, k.released[i], (number, block))
            k.released[i] += 1
            while block > begin:
                block -= 1
                yield from k.wait(i, k.released[i], (number, block))
                yield lambda: self.turns[i]
                yield from v.wait(i, v.released[i], (number, block + 1))
                self.computed[i].append((number, block + 1))
                yield from self.turn(i)
                k.released[i] += 1
                v.released[i] += 1
            self.queries_released[i] += 1
            yield from v.wait(i, v.released[i], (number, block))
            self.computed[i].append((number, block))
            v.released[i] += 1
            for skipped in range(block - 1, first - 1, -1):  # skip_last_blocks
                yield from k.wait(i, k.released[i], (number, skipped))
                k.released[i] += 1
                yield from self.turn(i)
                yield from v.wait(i, v.released[i], (number, skipped))
                v.released[i] += 1

    def run(self, rng):
        roles = [self.producer(), *(self.warpgroup(i) for i in range(self.warpgroups))]
        waits = {role: next(role, None) for role in roles}
        while waits := {role: wait for role, wait in waits.items() if wait is not None}:
            ready = [role for role, wait in waits.items() if wait()]
            assert ready, "all wait for one another"
            role = rng.choice(ready)
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
            play = Play(tiles, rng.choice([1, 2, 3]), warpgroups)
            play.run(rng)
            for i in range(warpgroups):
                expected = [
                    (number, block)
                    for number in range(len(tiles))
                    for block in seen(case, number, len(tiles), i)
                ]
                assert play.computed[i] == expected, case
                owns = [tile[1 + i] for tile in tiles]
                skipping += any(own[0] > tile[0][0] for own, tile in zip(owns, tiles, strict=True))
    assert dense > 20
    assert skipping > 50
