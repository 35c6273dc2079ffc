"""How a call to a cache is dealt to CTAs (attention/decode/work.hpp). Nothing here needs a GPU."""

import random
from collections import defaultdict

import pytest
from host_program import CHECKED, host_program, needs_cxx

pytestmark = needs_cxx

NONE = -1  # a limit of the window without a value
TILE_ROWS, TILE_N, CONSUMERS = 64, 32, 2
MAIN = f"""
#include <iostream>
#include <vector>
#include "cute_kernels/attention/decode/work.hpp"
using namespace cute_kernels::attention;

struct Tiling {{
  static constexpr int kTileRows = {TILE_ROWS};
  static constexpr int kTileN = {TILE_N};
  static constexpr int kConsumers = {CONSUMERS};
  static constexpr int kHeads = 1;
  static constexpr int kWarpgroupM = {TILE_ROWS // CONSUMERS};
}};

void deal(CachedCall const& call, int ctas, int num_splits) {{
  std::vector<int> starts{{0}};
  int longest = 0;
  for (int entry = 0; entry < call.batch; ++entry) {{
    SequenceWork const work = work_of<Tiling>(call, entry);
    starts.push_back(starts.back() + work.blocks);
    longest = greater(longest, work.longest);
  }}
  WorkLine const line(starts.back(), call.heads_kv, longest, call.batch, ctas, num_splits, 0);
  std::cout << line.share;
  for (int cta = 0; cta < ctas; ++cta) {{
    WorkPlace place = end_of_line(line);
    int const block = line.begin(cta);
    if (block < line.blocks) {{
      int const head = block / line.of_head;
      int entry = 0;
      while (starts[entry + 1] <= block % line.of_head) ++entry;
      place = place_in_sequence<Tiling>(cached_sequence(call, entry), entry, head,
                                        head * line.of_head + starts[entry], block);
    }}
    for (WorkWalk<Tiling> walk(call, line, place, cta); walk.valid(); walk.advance()) {{
      RowTile<Tiling> const& tile = walk.tile();
      for (int value : {{cta, walk.entry(), walk.head(), walk.sequence().row_q, tile.first_row,
                        tile.rows, tile.first_query, tile.last_query, tile.keys.begin,
                        tile.keys.end, walk.begin_block(), walk.end_block(),
                        int(walk.is_first_part()), walk.parts().first, walk.parts().count}}) {{
        std::cout << ' ' << value;
      }}
      for (int warpgroup = 0; warpgroup < Tiling::kConsumers; ++warpgroup) {{
        WarpgroupPart<Tiling> const part(walk, warpgroup);
        std::cout << ' ' << part.first_row << ' ' << part.begin << ' ' << part.turns;
      }}
    }}
  }}
  std::cout << '\\n';
}}

int main() {{
  auto limit = [](int value) {{
    return value == {NONE} ? std::nullopt : std::optional<int>(value);
  }};
  CachedCall call{{}};
  int left, right, ctas, num_splits;
  while (std::cin >> call.batch >> call.total_q >> call.heads_q >> call.heads_kv >>
         call.most_keys >> left >> right >> call.chunk >> ctas >> num_splits) {{
    call.group = call.heads_q / call.heads_kv;
    call.mask = {{std::nullopt, limit(left), limit(right)}};
    auto read = [](int count) {{
      std::vector<int> values(count);
      for (int& value : values) std::cin >> value;
      return values;
    }};
    std::vector<int> const cu = read(call.batch + 1), used = read(call.batch),
                           leftpad = read(call.batch);
    call.lengths = {{cu.data(), used.data(), leftpad.data()}};
    deal(call, ctas, num_splits);
  }}
}}
"""
FIELDS = [
    *("cta", "entry", "head", "row_q", "first_row", "rows", "first_query", "last_query"),
    *("begin", "end", "first_block", "end_block", "is_first", "first_cta", "count"),
    *(f"{field}_{i}" for i in range(CONSUMERS) for field in ("row", "block", "turns")),
]


@pytest.fixture(scope="module")
def deal(tmp_path_factory):
    """The C++ functions: the share, and the parts of items in the order of CTAs."""
    program = host_program(tmp_path_factory.mktemp("decode_work"), MAIN, "-O1", *CHECKED)

    def run(queries, used, leftpad, heads, mask, ctas, num_splits):
        starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
        room = max([0, *used])
        head = [len(queries), starts[-1], *heads, room, *mask, ctas, num_splits]
        ((share, *values),) = program([[*head, *starts, *used, *leftpad]])
        step = len(FIELDS)
        return share, [
            dict(zip(FIELDS, values[i : i + step], strict=True))
            for i in range(0, len(values), step)
        ]

    return run


def seen(query, seqlen_q, keys, leftpad, mask):
    """The keys that a query sees."""
    left, right, chunk = mask
    position = query + keys - seqlen_q
    begin = leftpad if left == NONE else max(leftpad, position - left)
    end = keys if right == NONE else min(keys, position + right + 1)
    if chunk > 0:
        of_query = (position - leftpad) // chunk
        begin = max(begin, leftpad + of_query * chunk)
        end = min(end, leftpad + (of_query + 1) * chunk)
    return range(begin, max(begin, end))


def random_case(chance):
    batch = chance.randint(0, 7)
    queries = [chance.choice([0, 0, 1, 1, 2, 9, chance.randint(10, 200)]) for _ in range(batch)]
    used = [chance.choice([0, 1, 31, 32, 33, chance.randint(0, 700)]) for _ in range(batch)]
    leftpad = [chance.choice([0, chance.randint(0, n)]) for n in used]
    key_heads = chance.randint(1, 3)
    heads = (key_heads * chance.choice([1, 3, 8]), key_heads)
    mask = chance.choice([(NONE, NONE), (NONE, 0), (40, 0), (0, 0), (10, 5), (NONE, 90)])
    mask = (*mask, chance.choice([0, 0, 1, 50, 64, 2**30]))
    return queries, used, leftpad, heads, mask, chance.choice([1, 2, 7, 100]), chance.randint(0, 5)


@pytest.mark.parametrize("seed", range(40))
def test_every_block_is_in_one_part(deal, seed):
    queries, used, leftpad, heads, mask, ctas, num_splits = case = random_case(random.Random(seed))
    share, parts = deal(*case)
    group = heads[0] // heads[1]
    items = defaultdict(list)
    for part in parts:
        items[part["entry"], part["head"], part["first_row"]].append(part)

    expected = {
        (entry, head, row)
        for entry, n in enumerate(queries)
        for head in range(heads[1])
        for row in range(0, n * group, TILE_ROWS)
    }
    assert set(items) == expected

    loads, slots = defaultdict(int), set()
    for (entry, _, first_row), own in items.items():
        seqlen_q = queries[entry]
        rows = min(TILE_ROWS, seqlen_q * group - first_row)
        of_tile = range(first_row // group, (first_row + rows - 1) // group + 1)
        keys = {
            key
            for query in of_tile
            for key in seen(query, seqlen_q, used[entry], leftpad[entry], mask)
        }
        first = own[0]
        assert first["row_q"] == sum(queries[:entry])
        assert first["rows"] == rows
        assert (first["first_query"], first["last_query"]) == (of_tile[0], of_tile[-1])
        if keys:
            assert (first["begin"], first["end"]) == (min(keys), max(keys) + 1)
        else:
            assert first["begin"] >= first["end"]
        # One part behind the other, of one CTA behind the other
        assert [part["first_block"] for part in own] == [
            0,
            *(part["end_block"] for part in own[:-1]),
        ]
        blocks = -(-(max(keys) + 1 - min(keys)) // TILE_N) if keys else 0
        assert own[-1]["end_block"] == blocks
        assert [part["is_first"] for part in own] == [1] + [0] * (len(own) - 1)
        assert {part["count"] for part in own} == {len(own)}
        if len(own) > 1:
            assert num_splits == 0 or len(own) <= num_splits
            assert [part["cta"] for part in own] == [
                first["first_cta"] + i for i in range(len(own))
            ]
            taken = {(part["cta"], part["is_first"]) for part in own}
            assert not taken & slots
            slots |= taken
        for part in own:
            loads[part["cta"]] += max(1, part["end_block"] - part["first_block"])
    assert max(loads, default=0) < ctas
    if num_splits != 1:
        assert all(load <= share for load in loads.values())
        if num_splits == 0:
            least = max(1, -(-sum(loads.values()) // ctas))
            assert least <= share <= least + least // 16


@pytest.mark.parametrize("seed", range(10))
def test_every_row_and_block_is_one_warpgroups(deal, seed):
    rows_of_warpgroup = TILE_ROWS // CONSUMERS
    _, parts = deal(*random_case(random.Random(seed)))
    for part in parts:
        taken = [
            (row, block)
            for i in range(CONSUMERS)
            for row in range(part[f"row_{i}"], part[f"row_{i}"] + rows_of_warpgroup)
            for block in range(part[f"block_{i}"], part["end_block"], part[f"turns_{i}"])
        ]
        blocks = range(part["first_block"], part["end_block"])
        rows = range(TILE_ROWS if part["rows"] > rows_of_warpgroup else rows_of_warpgroup)
        assert sorted(taken) == [(row, block) for row in rows for block in blocks]


def test_shares_divide_all_heads_alike(deal):
    """Where that makes them 1/16 longer at most."""
    for lengths, key_heads, ctas, share in [
        ([2048 * TILE_N], 8, 132, 128),
        ([64 * TILE_N], 8, 132, 4),
        ([128 * TILE_N] * 32, 8, 132, 256),
        ([1000, 17, 65000, 3333], 8, 132, 136),
        ([128 * TILE_N] * 3, 130, 132, 3 * 128),
        ([128 * TILE_N], 88, 132, 86),  # 128 would be too long
        ([64 * TILE_N] * 128, 1, 66, 128),  # of one head whole items
        ([64 * TILE_N] * 127 + [63 * TILE_N], 1, 66, 125),  # if they are equal
        ([128 * TILE_N] * 64, 1, 132, 64),
    ]:
        batch = len(lengths)
        found, parts = deal(
            [1] * batch, lengths, [0] * batch, (key_heads, key_heads), (NONE, 0, 0), ctas, 0
        )
        assert found == share
        of_head = sum(part["end_block"] - part["first_block"] for part in parts) // key_heads
        if of_head % share and share % of_head:
            continue
        ctas_of_head = max(1, of_head // share)
        cuts = [
            {
                (part["entry"], part["first_block"], part["end_block"], part["cta"] % ctas_of_head)
                for part in parts
                if part["head"] == head
            }
            for head in range(key_heads)
        ]
        assert all(cut == cuts[0] for cut in cuts)


def test_shares_longer_than_the_line(deal):
    """The longest cache there may be, in few parts: most CTAs have none, and begin behind the end
    of the line, far beyond what an int counts."""
    longest = 2**30
    _, parts = deal([1], [longest], [0], (1, 1), (NONE, NONE, 0), 264, 2)
    blocks = longest // TILE_N
    assert [(part["first_block"], part["end_block"]) for part in parts] == [(0, blocks)]
    _, parts = deal([1], [longest], [0], (1, 1), (NONE, NONE, 0), 264, 3)
    assert [(part["first_block"], part["end_block"]) for part in parts] == [
        (0, blocks // 2),
        (blocks // 2, blocks),
    ]


QUOTIENTS = """
#include <iostream>
#include "cute_kernels/attention/decode/work.hpp"

int main() {
  int a, b;
  while (std::cin >> a >> b) std::cout << cute_kernels::attention::quotient(a, b) << '\\n';
}
"""


def test_quotients_are_those_of_integers(tmp_path):
    """Of multiples, of numbers next to them, of all sizes that a line may have."""
    chance = random.Random(0)
    most = 2_000_000_000
    pairs = [(0, 1), (0, most), (most, 1), (most, most), (most - 1, most)]
    for _ in range(3000):
        b = min(most, int(2 ** chance.uniform(0, 31)))
        multiple = chance.randint(0, most // b) * b
        pairs += [(a, b) for a in (multiple - 1, multiple, multiple + b - 1) if 0 <= a <= most]
    program = host_program(tmp_path, QUOTIENTS, "-O1", *CHECKED)
    assert program(pairs) == [[a // b] for a, b in pairs]
