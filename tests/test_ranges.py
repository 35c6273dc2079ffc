"""Which blocks a mask leaves to do (attention/ranges.hpp), against all pairs of a query and a key.
The same functions run on the GPU. Nothing here needs one."""

import itertools
import random

import pytest
import torch
from host_program import CHECKED, host_program, needs_cxx

from cute_kernels.checks import ROWS_LIMIT
from cute_kernels.tile_checks import is_own_mask

pytestmark = needs_cxx

NONE = -1000  # a mask's field without a value
MAIN = f"""
#include <iostream>
#include "cute_kernels/attention/ranges.hpp"
using namespace cute_kernels::attention;

void print(BlockRange range) {{
  std::cout << ' ' << range.begin << ' ' << range.full_begin << ' ' << range.full_end << ' '
            << range.end;
}}

void print_columns() {{
  int first, end;
  while (std::cin >> first >> end) {{
    std::cout << columns_between<16>(first, end) << ' ' << columns_between<32>(first, end) << '\\n';
  }}
}}

int main(int count_of_arguments, char** arguments) {{
  bool const only_keys = count_of_arguments > 1 && arguments[1][0] == 'k';
  if (count_of_arguments > 2) return print_columns(), 0;
  AttentionCall call{{}};
  int diagonal, left, right, first, count, block;
  auto field = [](int value) {{
    return value == {NONE} ? std::nullopt : std::optional<int>(value);
  }};
  while (std::cin >> call.sizes.seqlen_q >> call.sizes.seqlen_k >> diagonal >> left >> right >>
         first >> count >> block) {{
    call.mask = {{field(diagonal), field(left), field(right)}};
    WindowRanges const window(call);
    if (only_keys) {{
      print(window.key_blocks(first, count, block));
      if (auto const kernel = kernel_ranges(call)) print(kernel->key_blocks(first, count, block));
      std::cout << '\\n';
      continue;
    }}
    if (count_of_arguments > 1) {{
      VisitedKeys const keys = visited_keys(window, block);
      std::cout << keys.mean << ' ' << keys.most << ' ' << keys.least << '\\n';
      continue;
    }}
    print(window.key_blocks(first, count, block));
    print(window.query_blocks(first, count, block));
    if (auto const kernel = kernel_ranges(call)) {{
      print(kernel->key_blocks(first, count, block));
      print(kernel->query_blocks(first, count, block));
    }}
    std::cout << '\\n';
  }}
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The C++ functions: lines of numbers for cases."""
    run = host_program(tmp_path_factory.mktemp("ranges"), MAIN, *CHECKED)
    return lambda cases, *arguments: run(cases, *arguments, number=float)


@pytest.fixture
def block_ranges(program):
    """Of each case a range of key blocks, one of query blocks, and the kernels' where they read
    the mask."""

    def call(cases: list[tuple[int, ...]], *arguments: str) -> list[list[tuple[int, ...]]]:
        lines = [list(map(int, line)) for line in program(cases, *arguments)]
        return [[tuple(line[i : i + 4]) for i in range(0, len(line), 4)] for line in lines]

    return call


def sees(case: tuple[int, ...], query: int, key: int) -> bool:
    """MaskSpec's definition (attention/call.hpp)."""
    seqlen_q, seqlen_k, diagonal, left, right = case[:5]
    at = query + (seqlen_k - seqlen_q if diagonal == NONE else diagonal)
    return (left == NONE or key >= at - left) and (right == NONE or key <= at + right)


def expected(case: tuple[int, ...], of_queries: bool) -> tuple[set[int], set[int]]:
    """The blocks that some or all of the rows `first` to `first + count` see or are seen by, and
    those of them that need no mask."""
    seqlen_q, seqlen_k, *_, first, count, block = case
    rows = seqlen_k if of_queries else seqlen_q
    others = seqlen_q if of_queries else seqlen_k
    there = [row for row in range(first, first + count) if 0 <= row < rows]
    pairs = {
        other: [sees(case, *((other, row) if of_queries else (row, other))) for row in there]
        for other in range(others)
    }
    numbers = range(-(-others // block))
    members = {b: range(b * block, min((b + 1) * block, others)) for b in numbers}
    some = {b for b in numbers if any(any(pairs[other]) for other in members[b])}
    # Keys behind the last one need a mask, queries behind it do not.
    whole = {b for b in some if all(all(pairs[other]) for other in members[b])}
    if of_queries:
        return some, whole if first + count <= seqlen_k else set()
    return some, {b for b in whole if (b + 1) * block <= seqlen_k}


def blocks_of(answer: tuple[int, ...]) -> tuple[set[int], set[int]]:
    begin, full_begin, full_end, end = answer
    visited = set(range(begin, end))
    return visited, visited & set(range(full_begin, full_end))


def random_case(rng: random.Random) -> tuple[int, ...]:
    seqlen_q, seqlen_k = rng.randint(1, 40), rng.choice([0, 1, *range(2, 60)])
    diagonal = rng.choice([NONE, NONE, 0, rng.randint(-50, 70)])
    left = rng.choice([NONE, 0, rng.randint(-4, 20), rng.randint(0, 80)])
    right = rng.choice([NONE, 0, 0, rng.randint(-4, 20), rng.randint(0, 80)])
    first = rng.randint(0, max(seqlen_q, seqlen_k))
    return seqlen_q, seqlen_k, diagonal, left, right, first, rng.randint(1, 24), rng.randint(1, 24)


def test_ranges_hold_the_blocks_that_are_seen_and_only_them(block_ranges):
    rng = random.Random(22)
    cases = [random_case(rng) for _ in range(4000)]
    kernels = 0
    for case, (keys, queries, *of_kernels) in zip(cases, block_ranges(cases), strict=True):
        assert blocks_of(keys) == expected(case, False), case
        assert blocks_of(queries) == expected(case, True), case
        if of_kernels:
            kernels += 1
            assert [blocks_of(answer) for answer in of_kernels] == [
                expected(case, False),
                expected(case, True),
            ], case
    assert 300 < kernels < len(cases) * 0.7


def test_tiles_may_begin_before_the_first_query(block_ranges):
    rng = random.Random(23)
    cases = [(*case[:5], -rng.randint(1, 30), *case[6:]) for case in map(random_case, [rng] * 500)]
    for case, (keys, *_) in zip(cases, block_ranges(cases), strict=True):
        assert blocks_of(keys) == expected(case, False), case


@pytest.mark.parametrize(
    ("mask", "is_read"),
    [
        ((NONE, NONE, NONE), True),
        ((7, NONE, NONE), True),  # a diagonal without an end has no meaning
        ((NONE, NONE, 0), True),
        ((20, NONE, 0), True),  # bottom-right in other words
        ((18, NONE, 2), True),
        ((0, NONE, 0), False),
        ((NONE, NONE, 1), False),
        ((NONE, 5, 0), False),
        ((NONE, 100, 100), True),  # nothing is hidden
        ((NONE, 28, 100), False),
        ((NONE, 29, 0), True),
    ],
)
def test_which_masks_kernels_read(block_ranges, mask, is_read):
    (answer,) = block_ranges([(10, 30, *mask, 0, 4, 4)])
    assert (len(answer) > 2) == is_read


def test_the_package_knows_too_which_masks_kernels_read(block_ranges):
    rng = random.Random(25)
    cases = [
        case
        for case in map(random_case, [rng] * 3000)
        if case[1] > 0 and all(limit == NONE or limit >= 0 for limit in case[3:5])
    ]
    for case, answer in zip(cases, block_ranges(cases), strict=True):
        q, k = (torch.empty(1, seqlen, 1, 8, device="meta") for seqlen in case[:2])
        diagonal, left, right = (None if n == NONE else n for n in case[2:5])
        assert is_own_mask(q, k, left, right, diagonal) == (len(answer) == 2), case


def test_limits_as_large_as_an_int_holds(block_ranges):
    most = 2**31 - 1
    full = [(10, 30, most, most, most, 0, 10, 4), (10, 30, NONE, most, most, 0, 10, 4)]
    none = [(10, 30, most, NONE, -most, 0, 10, 4), (10, 30, -most, most, NONE, 0, 10, 4)]
    *_, hidden, shown = block_ranges([*full, *none])
    for (keys, *_), case in zip(block_ranges(full), full, strict=True):
        assert blocks_of(keys) == expected(case, False)
    assert blocks_of(hidden[0]) == expected(none[0], False)
    assert blocks_of(shown[0]) == expected(none[1], False)


def visited_keys(case: tuple[int, ...], tile_m: int) -> tuple[float, int]:
    """Of all tiles: the mean of a query's tile, and the most of a tile."""
    seqlen_q, seqlen_k, diagonal, left, right = case
    at = seqlen_k - seqlen_q if diagonal == NONE else diagonal
    tiles = -(-seqlen_q // tile_m)
    first = -(-seqlen_q // 64) * 64 - tiles * tile_m
    of_tiles = []
    for start in range(first, first + tiles * tile_m, tile_m):
        queries = range(max(0, start), min(start + tile_m, seqlen_q))
        begin = 0 if left == NONE else max(0, queries[0] + at - left)
        end = seqlen_k if right == NONE else min(seqlen_k, queries[-1] + at + right + 1)
        of_tiles.append((len(queries), max(0, end - begin)))
    return sum(n * keys for n, keys in of_tiles) / seqlen_q, max(keys for _, keys in of_tiles)


def test_as_many_rows_as_a_call_may_have(block_ranges):
    """No sum is more than an int holds, also behind the last query."""
    cases = []
    for seqlen_q in (1, 300, 2**30, ROWS_LIMIT - 2):
        seqlen_k = ROWS_LIMIT - 1 - seqlen_q
        for first in {0, max(0, seqlen_q - 100)}:
            for left, right in itertools.product((NONE, 0, 500, 2**31 - 1), (NONE, 0, 500)):
                for block in (64, 80, 256):
                    cases.append((seqlen_q, seqlen_k, NONE, left, right, first, 256, block))
    for case, answers in zip(cases, block_ranges(cases, "keys"), strict=True):
        seqlen_q, seqlen_k, _, left, right, first, count, block = case
        last, at = min(first + count, seqlen_q) - 1, seqlen_k - seqlen_q
        end, full_end = (
            max(0, seqlen_k if right == NONE else min(seqlen_k, query + at + right + 1))
            for query in (last, first)
        )
        begin, full_begin = (
            0 if left == NONE else max(0, query + at - left) for query in (first, last)
        )
        right_range = (begin // block, -(-full_begin // block), full_end // block, -(-end // block))
        if begin >= end:
            right_range = (0, 0, 0, 0)
        assert set(answers) == {right_range}, case


def test_sampled_tiles_stand_for_all(program):
    rng = random.Random(24)
    cases = []
    for _ in range(500):
        seqlen_q = rng.choice([rng.randint(1, 1000), rng.randint(1, 20000)])
        seqlen_k = rng.choice([seqlen_q, rng.randint(0, 40000)])
        left = rng.choice([NONE, NONE, rng.randint(0, 5000)])
        right = rng.choice([NONE, 0, 0, rng.randint(0, 5000)])
        cases.append((seqlen_q, seqlen_k, NONE, left, right, 0, 0, rng.choice([64, 128, 192, 256])))
    for case, (mean, most, least) in zip(cases, program(cases, "tiles"), strict=True):
        exact_mean, exact_most = visited_keys(case[:5], case[-1])
        sampled = case[0] > 9 * case[-1]
        assert most == pytest.approx(exact_most, rel=0.1 if sampled else 1e-4), case
        assert abs(mean - exact_mean) <= (0.1 if sampled else 1e-4) * exact_most, case
        assert 0 <= least <= most, case


def test_columns_between_two_ends(program):
    """Columns of a thread are 0, 1, 8, 9, 16 and so on; the ends may lie anywhere."""
    far = [-(2**30), -9, -1, 2**30]
    cases = list(itertools.product([*far, *range(135)], repeat=2))
    for (first, end), (of_16, of_32) in zip(cases, program(cases, "columns", "only"), strict=True):
        bits = [int(first <= 8 * (i // 2) + i % 2 < end) << i for i in range(32)]
        assert (of_16, of_32) == (sum(bits[:16]), sum(bits)), (first, end)
