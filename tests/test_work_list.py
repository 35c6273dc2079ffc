"""The order of tiles of sequences of any lengths (attention/schedule/work_list.hpp): the phases
that one CTA runs on the GPU, here one thread after the other. Nothing here needs a GPU."""

import random

import pytest
from host_program import CHECKED, host_program, needs_cxx

pytestmark = needs_cxx

HEADS = 3
NEIGHBOURS = {64: 4, 128: 4, 192: 2}  # by tile_m
NONE = -1000  # a mask's field without a value
MAIN = f"""
#include <iostream>
#include <vector>
#include "tests/host_lists.hpp"
using namespace cute_kernels::attention;

constexpr int kHeads = {HEADS};

template <int kTileM, int kTileN>
void list_tiles(AttentionCall const& call) {{
  using Tiling = QueryTiling<kTileM, kTileN>;
  HostWorkList<WorkListBuilder<Tiling>> const listed(call, call.sizes.batch,
                                                     most_tiles(call, kTileM));
  WorkList const& list = listed.list;
  std::cout << *list.count << ' ' << list.most;
  for (int i = 0; i < *list.count; ++i) {{
    WorkTile const& tile = list.tiles[i];
    Sequence const& of = tile.sequence;
    for (int value : {{tile.first_row, of.batch, of.row_q, of.row_k, of.seqlen_q, of.seqlen_k,
                      Tiling::length(tile.ranges(), tile.first_row)}}) {{
      std::cout << ' ' << value;
    }}
  }}
  std::cout << '\\n';
  for (int place = 0; place < *list.count * kHeads; ++place) {{
    ListedTile const tile = listed_tile<Tiling::kNeighbours>(
        place, *list.count, PlainDivisor{{kHeads * Tiling::kNeighbours}});
    std::cout << tile.entry << ' ' << tile.head << ' ';
  }}
  std::cout << '\\n';
}}

int main() {{
  auto field = [](int value) {{
    return value == {NONE} ? std::nullopt : std::optional<int>(value);
  }};
  int diagonal, left, right, tile_m, tile_n;
  AttentionCall call{{}};
  CallSizes& sizes = call.sizes;
  PackedLengths& packed = call.packed;
  while (std::cin >> sizes.batch >> sizes.seqlen_q >> sizes.seqlen_k >> packed.total_q >>
         packed.total_k >> diagonal >> left >> right >> tile_m >> tile_n) {{
    call.mask = {{field(diagonal), field(left), field(right)}};
    std::vector<int> const cu_q = read_numbers(), cu_k = read_numbers(),
                           used_q = read_numbers(), used_k = read_numbers(),
                           diagonals = read_numbers();
    auto given = [](std::vector<int> const& values) {{
      return values.empty() ? nullptr : values.data();
    }};
    packed.cu_seqlens_q = given(cu_q);
    packed.cu_seqlens_k = given(cu_k);
    packed.seqused_q = given(used_q);
    packed.seqused_k = given(used_k);
    packed.diagonal = given(diagonals);
    if (tile_m == 64 && tile_n == 16) list_tiles<64, 16>(call);
    if (tile_m == 128 && tile_n == 64) list_tiles<128, 64>(call);
    if (tile_m == 192 && tile_n == 80) list_tiles<192, 80>(call);
    for (int row = 0; row < tensor_rows_q(call) && call.is_packed(); ++row) {{
      std::cout << is_used(packed.cu_seqlens_q, packed.seqused_q, packed.total_q, sizes.batch, row)
                << ' ';
    }}
    std::cout << '\\n';
  }}
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The C++ functions: lines of numbers for cases, three for each: the list, the order of its
    tiles' heads, which rows are used."""
    return host_program(tmp_path_factory.mktemp("work_list"), MAIN, "-O1", *CHECKED)


def starts(slots):
    return [sum(slots[:i]) for i in range(len(slots) + 1)]


def visible(seqlen_q, seqlen_k, mask):
    """Of each query the keys that it sees, as a range."""
    diagonal, left, right = mask
    at = seqlen_k - seqlen_q if diagonal == NONE else diagonal
    return [
        range(
            0 if left == NONE else max(0, i + at - left),
            seqlen_k if right == NONE else max(0, min(seqlen_k, i + at + right + 1)),
        )
        for i in range(seqlen_q)
    ]


def length_of(seen, tile_n):
    """The blocks between the first key that is seen and the last."""
    seen = [keys for keys in seen if keys]
    if not seen:
        return 0
    return max(keys[-1] for keys in seen) // tile_n - min(keys[0] for keys in seen) // tile_n + 1


def random_case(rng):
    batch = rng.choice([0, 1, 2, 3, 5, 7, 9, 60, 60, 60, 1100 if rng.random() < 0.3 else 60])
    longest = {60: 40, 1100: 2}.get(batch, rng.choice([150, 150, 150, 3000]))
    slots_q, slots_k = (
        [rng.choice([0, 1, rng.randint(0, longest)]) for _ in range(batch)] for _ in range(2)
    )
    if rng.random() < 0.3:  # a dense call
        slots_q, slots_k = [rng.randint(1, longest)] * batch, [rng.randint(0, longest)] * batch
        packed = False
    else:
        packed = True
    used_q, used_k = (
        [rng.randint(0, n) for n in slots] if packed and rng.random() < 0.5 else []
        for slots in (slots_q, slots_k)
    )
    diagonals = [rng.randint(-50, 150) for _ in slots_q] if packed and rng.random() < 0.2 else []
    mask = (
        rng.choice([NONE, NONE, 0, rng.randint(-20, 50)]),
        rng.choice([NONE, 0, rng.randint(0, 60)]),
        rng.choice([NONE, 0, 0, rng.randint(0, 60)]),
    )
    tile = rng.choice([(64, 16), (128, 64), (192, 80)])
    return packed, slots_q, slots_k, used_q, used_k, diagonals, mask, tile


def numbers(case, tail=3):
    packed, slots_q, slots_k, used_q, used_k, diagonals, mask, tile = case
    sizes = (len(slots_q), max(slots_q, default=0), max(slots_k, default=0))
    totals = (sum(slots_q) + tail, sum(slots_k) + tail)
    lists = [starts(slots_q), starts(slots_k), used_q, used_k, diagonals]
    lists = lists if packed else [[]] * 5
    return [*sizes, *totals, *mask, *tile, *(n for x in lists for n in (len(x), *x))]


def test_every_tile_is_there_once_and_the_longest_come_first(program):
    rng = random.Random(5)
    cases = [random_case(rng) for _ in range(100)]
    lines = program([numbers(case) for case in cases])
    for case, line, order, used in zip(cases, *(lines[i::3] for i in range(3)), strict=True):
        packed, slots_q, slots_k, used_q, used_k, diagonals, mask, (tile_m, tile_n) = case
        lengths_q, lengths_k = used_q or slots_q, used_k or slots_k
        expected = []
        for i, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            own = (diagonals[i], *mask[1:]) if diagonals else mask
            tiles = -(-n_q // tile_m)
            first = -(-n_q // 64) * 64 - tiles * tile_m
            place = (0, starts(slots_q)[i], starts(slots_k)[i]) if packed else (i, 0, 0)
            seen = visible(n_q, n_k, own)
            rows = range(first, first + tiles * tile_m, tile_m)
            lengths = [length_of(seen[max(0, row) : row + tile_m], tile_n) for row in rows]
            for tile, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                group = (tiles - 1 - tile) // NEIGHBOURS[tile_m]
                leader = lengths[tiles - 1 - group * NEIGHBOURS[tile_m]]
                expected.append((leader, (row, *place, n_q, n_k, length)))
        count, most, *rest = line
        tiles = [tuple(rest[i : i + 7]) for i in range(0, len(rest), 7)]
        assert count == len(tiles) <= most
        neighbours = NEIGHBOURS[tile_m]
        longest = max((leader for leader, _ in expected), default=0)
        # stable within one of 32 classes of length
        expected.sort(key=lambda tile: (longest - tile[0]) * 32 // (longest + 1))
        expected = [tile for _, tile in expected]
        assert tiles == expected, case
        groups = [range(i, min(i + neighbours, count)) for i in range(0, count, neighbours)]
        assert list(zip(order[::2], order[1::2], strict=True)) == [
            (entry, head) for group in groups for head in range(HEADS) for entry in group
        ]
        if packed:
            slots = zip(starts(slots_q)[:-1], lengths_q, strict=True)
            rows = {row for start, n in slots for row in range(start, start + n)}
            assert [i for i, is_used in enumerate(used) if is_used] == sorted(rows)


def test_whatever_cu_seqlens_holds_stays_inside(program):
    """Under the sanitisers: no index of the list, and no row of a tensor, beyond its end."""
    rng = random.Random(6)
    cases = []
    for _ in range(300):
        batch, total_q, total_k = rng.randint(1, 6), rng.randint(0, 300), rng.randint(0, 300)
        most = rng.choice([400, 2**31 - 1])

        def wild(count, most=most):
            return [count, *(rng.choice([0, rng.randint(-most, most)]) for _ in range(count))]

        lists = wild(batch + 1) + wild(batch + 1) + wild(batch) + wild(batch) + wild(batch)
        tile = (64, 16)
        cases.append([batch, 300, 300, total_q, total_k, NONE, 5, 0, *tile, *lists])
    for case, (count, most, *rest) in zip(cases, program(cases)[::3], strict=True):
        assert count <= most
        for i in range(0, len(rest), 7):
            _, _, row_q, row_k, seqlen_q, seqlen_k, _ = rest[i : i + 7]
            assert 0 <= row_q <= row_q + seqlen_q <= case[3]
            assert 0 <= row_k <= row_k + seqlen_k <= case[4]
