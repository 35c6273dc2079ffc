"""The tiles of many queries to a cache (attention/prefill/sequences.hpp), and that each sequence is
one of two launches'. Nothing here needs a GPU."""

import random
from collections import defaultdict

import pytest
from host_program import CHECKED, host_program, needs_cxx
from test_decode_work import NONE, seen

pytestmark = needs_cxx

TILE_M, TILE_N = 192, 32
NO_LIMIT = 2**31 - 1
MAIN = f"""
#include <iostream>
#include <vector>
#include "cute_kernels/attention/prefill/cut.hpp"
#include "cute_kernels/attention/prefill/sequences.hpp"
#include "tests/host_lists.hpp"
using namespace cute_kernels::attention;

/// As cut_last_tiles() does on the device.
std::vector<WorkTile> cut_tiles(WorkList const& list, int heads, int ctas) {{
  TileCut const cut(*list.count, heads, ctas, {TILE_M} / 64);
  std::vector<WorkTile> tiles(list.tiles, list.tiles + cut.first);
  for (int i = cut.first; i < *list.count; ++i) {{
    for (int number = 0; number < cut.pieces; ++number) {{
      WorkTile const piece = piece_of(list.tiles[i], number, 64);
      if (has_rows(piece, 64)) tiles.push_back(piece);
    }}
  }}
  return tiles;
}}

void list_tiles(CachedCall const& call, int ctas) {{
  using Tiling = QueryTiling<{TILE_M}, {TILE_N}>;
  HostWorkList<WorkListBuilder<Tiling, CachedCall>> const listed(call, call.batch,
                                                                 most_tiles(call, {TILE_M}));
  for (WorkTile const& tile : cut_tiles(listed.list, call.heads_kv, ctas)) {{
    Sequence const& of = tile.sequence;
    GroupedRanges<PlainDivisor> const rows(of.seqlen_q, of.seqlen_k, tile.left_edge,
                                           tile.right_edge, {{call.group}});
    BlockRange const keys = rows.key_blocks(tile.first_row, {TILE_M}, {TILE_N});
    std::cout << of.batch << ' ' << tile.first_row << ' ' << of.row_q << ' ' << of.row_k << ' '
              << of.seqlen_q << ' ' << keys.begin << ' ' << keys.end << ' ' << keys.left_end()
              << ' ' << keys.right_begin();
    for (int row = 0; row < of.seqlen_q; ++row) {{
      if (row >= tile.first_row && row < tile.first_row + {TILE_M}) {{
        std::cout << ' ' << rows.first_key(row) << ' ' << rows.end_key(row);
      }}
    }}
    for (int key = 0; key < of.seqlen_k; ++key) {{
      std::cout << ' ' << rows.first_query(key) << ' ' << rows.end_query(key);
    }}
    std::cout << '\\n';
  }}
}}

int main() {{
  auto limit = [](int value) {{
    return value == {NONE} ? std::nullopt : std::optional<int>(value);
  }};
  CachedCall call{{}};
  int left, right, ctas;
  while (std::cin >> call.batch >> call.total_q >> call.heads_kv >> call.group >> call.most_keys >>
         left >> right >> call.least_rows >> call.most_rows >> ctas) {{
    call.mask = {{std::nullopt, limit(left), limit(right)}};
    auto read = [](int count) {{
      std::vector<int> values(count);
      for (int& value : values) std::cin >> value;
      return values;
    }};
    std::vector<int> const cu = read(call.batch + 1), used = read(call.batch),
                           leftpad = read(call.batch);
    call.lengths = {{cu.data(), used.data(), leftpad.data()}};
    list_tiles(call, ctas);
  }}
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return host_program(tmp_path_factory.mktemp("prefill_work"), MAIN, "-O1", *CHECKED)


@pytest.fixture(scope="module")
def tiles_of(program):

    def run(queries, used, leftpad, group, mask, ctas=1, least_rows=0, most_rows=NO_LIMIT):
        starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
        room = max([0, *used])
        head = [len(queries), starts[-1], 3, group, room, *mask, least_rows, most_rows, ctas]
        return program([[*head, *starts, *used, *leftpad]])

    return run


def random_case(chance):
    batch = chance.randint(1, 6)
    queries = [chance.choice([0, 1, 2, 16, 63, 64, chance.randint(10, 200)]) for _ in range(batch)]
    used = [chance.choice([0, 1, 31, 32, 33, chance.randint(0, 300)]) for _ in range(batch)]
    leftpad = [chance.choice([0, chance.randint(0, n)]) for n in used]
    mask = chance.choice([(NONE, NONE), (NONE, 0), (40, 0), (0, 0), (10, 5), (NONE, 90)])
    return queries, used, leftpad, chance.choice([1, 3, 8, 200]), mask


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_in_one_tile_with_all_keys_that_it_sees(tiles_of, seed):
    chance = random.Random(seed)
    queries, used, leftpad, group, mask = case = random_case(chance)
    tiles = tiles_of(*case, ctas=chance.choice([1, 20, 132]))
    rows_done = defaultdict(list)
    for entry, first_row, row_q, row_k, end_row, begin, end, left, right, *ends in tiles:
        assert (row_q, row_k) == (sum(queries[:entry]), leftpad[entry])
        keys = used[entry] - leftpad[entry]
        own = range(max(0, first_row), min(end_row, first_row + TILE_M))
        assert own
        rows_done[entry] += own
        of_rows, of_keys = ends[: 2 * len(own)], ends[2 * len(own) :]
        sights = []
        for row, first, last in zip(own, of_rows[::2], of_rows[1::2], strict=True):
            sight = seen(row // group, queries[entry], used[entry], leftpad[entry], (*mask, 0))
            sight = range(sight.start - leftpad[entry], sight.stop - leftpad[entry])
            assert range(first, max(first, last)) == sight or not (sight or first < last)
            sights.append(sight)
            if sight:
                assert begin <= sight[0] // TILE_N
                assert sight[-1] // TILE_N < end
            # Of blocks that need no mask it sees all.
            if left < right:
                assert sight.start <= left * TILE_N
                assert sight.stop >= right * TILE_N
        if not any(sights):
            assert begin == end
        for key, first, last in zip(range(keys), of_keys[::2], of_keys[1::2], strict=True):
            of_tile = {row for row, sight in zip(own, sights, strict=True) if key in sight}
            assert of_tile == set(own) & set(range(first, last))
    assert {entry: sorted(done) for entry, done in rows_done.items()} == {
        entry: list(range(n * group)) for entry, n in enumerate(queries) if n > 0
    }


def test_tiles_that_do_not_fill_a_round_are_cut(tiles_of):
    """3 heads a tile: 4 sequences of 22 tiles, of which the last has 64 rows."""
    case = [512] * 4, [600] * 4, [0] * 4, 8, (NONE, 0)
    rows = [min(tile[4], tile[1] + TILE_M) - max(0, tile[1]) for tile in tiles_of(*case, ctas=62)]
    # 264 places are 4 rounds and 16 places more, of 6 tiles
    assert len(rows) > 88
    assert rows.count(192) >= 88 - 6 - 4
    assert set(rows[88 - 6 :]) == {64}
    assert sum(rows) == 4 * 512 * 8
    # 264 places are 3 rounds and 24 places more, which pieces would make more than one
    whole = tiles_of(*case, ctas=48)
    assert len(whole) == 88


@pytest.mark.parametrize("seed", range(10))
def test_two_launches_share_the_sequences(tiles_of, seed):
    queries, *_, group, _ = case = random_case(random.Random(seed))
    limit = 129
    short = {tile[0] for tile in tiles_of(*case, most_rows=limit - 1)}
    long = {tile[0] for tile in tiles_of(*case, least_rows=limit)}
    assert short == {entry for entry, n in enumerate(queries) if 0 < n * group < limit}
    assert long == {entry for entry, n in enumerate(queries) if n * group >= limit}
