"""Where the rows and keys of calls with short windows stand in tiles (attention/window/plan.hpp),
against all pairs of a query and a key. The same functions run on the GPU. Nothing here needs
one."""

import random

import pytest
from host_program import CHECKED, host_program, needs_cxx

pytestmark = needs_cxx

NONE = -1000  # a mask's field without a value
TILES = [(64, 136), (256, 136), (192, 144)]  # tile_m, tile_n
MAIN = f"""
#include <iostream>
#include <vector>
#include "cute_kernels/attention/window/plan.hpp"
#include "tests/host_lists.hpp"
using namespace cute_kernels::attention;

// Of each row that a consumer has: the tensor's row and entry, the head of the group, the rows of
// the tensors that hold the first key and the one behind the last, their columns in the
// warpgroup's block, and how many rows of the tile's keys P V reads and TMA brings.
template <int kTileM, int kTileN>
void list_rows(AttentionCall const& call) {{
  using Tiling = RowTiling<kTileM>;
  constexpr int kRows = WindowKeys::kWarpgroupM, kWarpgroups = kTileM / kRows;
  GroupedCall const grouped = grouped_call(call);
  int const group = 1 << grouped.group_log2;
  HostWorkList<WorkListBuilder<Tiling, GroupedCall>> const listed(grouped, call.sizes.batch,
                                                                  most_tiles(grouped, kTileM));
  WorkList const& list = listed.list;
  WindowKeys const keys{{kRows / group, kTileN}};
  for (int i = 0; i < *list.count; ++i) {{
    WorkTile const& tile = list.tiles[i];
    int const first_key = keys.first(tile.first_row >> grouped.group_log2, tile.right_edge);
    int const first_row = tile.sequence.row_k + first_key;  // that TMA brings
    SeenTile const seen = seen_tile(tile, grouped.group_log2, keys, 0);
    for (int row = 0; row < kTileM; ++row) {{
      int const query = row / group;
      if (query >= seen.queries) continue;
      int const shift = WindowKeys::shift(row / kRows * keys.queries);
      int const first = seen.first_seen(query), end = seen.end_seen(query);
      for (int value : {{seen.row + query, seen.batch, row % group, first_row + first,
                        first_row + end, first - shift, end - shift,
                        shift + WindowKeys::values(kTileN), keys.of_tile(kWarpgroups)}}) {{
        std::cout << value << ' ';
      }}
    }}
  }}
  std::cout << '\\n';
}}

int main() {{
  auto field = [](int value) {{
    return value == {NONE} ? std::nullopt : std::optional<int>(value);
  }};
  int diagonal, left, right, tile;
  AttentionCall call{{}};
  CallSizes& sizes = call.sizes;
  PackedLengths& packed = call.packed;
  while (std::cin >> sizes.batch >> sizes.seqlen_q >> sizes.seqlen_k >> packed.total_q >>
         packed.total_k >> sizes.heads_q >> sizes.heads_kv >> diagonal >> left >> right >> tile) {{
    call.mask = {{field(diagonal), field(left), field(right)}};
    std::vector<int> const cu_q = read_numbers(), cu_k = read_numbers();
    packed.cu_seqlens_q = cu_q.empty() ? nullptr : cu_q.data();
    packed.cu_seqlens_k = cu_k.empty() ? nullptr : cu_k.data();
    constexpr int kKeys[] = {{{", ".join(str(n) for _, n in TILES)}}};
    if (!fits_window(call, kKeys[tile])) {{
      std::cout << "-1\\n";
      continue;
    }}
    switch (tile) {{
      {" ".join(f"case {i}: list_rows<{m}, {n}>(call); break;" for i, (m, n) in enumerate(TILES))}
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return host_program(tmp_path_factory.mktemp("window"), MAIN, *CHECKED)


def starts(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def fits(group, left, right, tile_n):
    if left == NONE or right == NONE or group not in (4, 8, 16, 32, 64):
        return False
    queries = 64 // group
    return max(0, left + right + 1) + queries - 1 + max(0, 8 - queries) <= tile_n


def random_case(chance):
    """Lengths of Q and K of each sequence, whether it is a dense call, heads, mask, tile."""
    packed = chance.random() < 0.6
    group = chance.choice([4, 8, 8, 16, 32, 64, 1, 2, 3, 128])
    heads_kv = chance.randint(1, 2)
    count = chance.randint(1, 4)
    length = lambda: chance.choice([0, 1, chance.randint(2, 40), chance.randint(40, 400)])  # noqa: E731
    of_q, of_k = ([length() for _ in range(count)] for _ in range(2))
    if not packed:
        of_q, of_k = [max(1, of_q[0])] * count, [of_k[0]] * count
    left, right = chance.choice([(127, 0), (128, 0), (60, 60), (0, 0), (3, 2), (-5, 9), (9, -20)])
    if chance.random() < 0.3:
        left, right = chance.randint(0, 100), chance.randint(0, 40)
    if chance.random() < 0.05:
        left = NONE
    diagonal = chance.choice([NONE, NONE, 0, chance.randint(-200, 300)]) if not packed else NONE
    tile = chance.randrange(len(TILES))
    return packed, of_q, of_k, group, heads_kv, diagonal, left, right, tile


def line_of(case):
    packed, of_q, of_k, group, heads_kv, diagonal, left, right, tile = case
    totals = (sum(of_q), sum(of_k)) if packed else (0, 0)
    cu = [*[len(of_q) + 1, *starts(of_q)], *[len(of_k) + 1, *starts(of_k)]] if packed else [0, 0]
    heads = group * heads_kv, heads_kv
    return [
        *(len(of_q), max(of_q), max(of_k), *totals, *heads, diagonal, left, right, tile),
        *cu,
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_has_its_keys_in_its_block(program, seed):
    chance = random.Random(seed)
    cases = [random_case(chance) for _ in range(100)]
    taken = 0
    for case, answer in zip(cases, program(map(line_of, cases)), strict=True):
        packed, of_q, of_k, group, _, diagonal, left, right, tile = case
        tile_n = TILES[tile][1]
        if not fits(group, left, right, tile_n):
            assert answer == [-1], case
            continue
        taken += 1
        wanted = {}
        for entry, (seqlen_q, seqlen_k) in enumerate(zip(of_q, of_k, strict=True)):
            row_q, row_k = (starts(of)[entry] if packed else 0 for of in (of_q, of_k))
            for query in range(seqlen_q):
                at = query + (seqlen_k - seqlen_q if diagonal == NONE else diagonal)
                first, end = max(0, at - left), min(seqlen_k, at + right + 1)
                keys = (row_k + first, row_k + end) if first < end else None
                for head in range(group):
                    wanted[row_q + query, 0 if packed else entry, head] = keys
        rows = [answer[i : i + 9] for i in range(0, len(answer), 9)]
        assert len(rows) == len(wanted), case
        for row, entry, head, first, end, column, end_column, used, there in rows:
            keys = wanted.pop((row, entry, head))
            assert ((first, end) if first < end else None) == keys, case
            if first < end:
                assert 0 <= column <= end_column <= tile_n, case
            assert used <= there <= 256, case
        assert not wanted
    assert taken > 20


def test_no_key_of_a_window_of_128_needs_a_second_block(program):
    """gpt-oss's: 8 queries of 8 heads see 135 keys."""
    for tile, (_, tile_n) in enumerate(TILES):
        case = (True, [300], [300], 8, 1, NONE, 127, 0, tile)
        assert len(program([line_of(case)])[0]) == 300 * 8 * 9
        longer = (True, [300], [300], 8, 1, NONE, tile_n - 7, 0, tile)
        assert program([line_of(longer)]) == [[-1]]
