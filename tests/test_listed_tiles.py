"""In which order the forward pass does the tiles of a call with a block mask
(attention/variant/listed_call.hpp): the same functions run on the GPU. Nothing here needs one."""

import random

import pytest
import torch
from host_program import CHECKED, host_program, needs_cxx

from cute_kernels.variants.block_mask import HIDDEN, block_lists

pytestmark = needs_cxx

UNIT = 128
MAIN = """
#include <iostream>
#include <vector>
#include "cute_kernels/attention/variant/listed_call.hpp"
#include "tests/host_lists.hpp"
using namespace cute_kernels::attention;

int main() {
  int heads, count;
  AttentionCall call{};
  CallSizes& sizes = call.sizes;
  while (std::cin >> sizes.batch >> heads >> sizes.seqlen_q >> sizes.seqlen_k >> count) {
    std::vector<int> counts(count);
    for (int& x : counts) std::cin >> x;
    BlockLists lists{};
    lists.counts = counts.empty() ? nullptr : counts.data();
    int const units = (sizes.seqlen_q + kMaskUnit - 1) / kMaskUnit;
    lists.rows_of_batch = count == heads * units ? 0 : heads * units;
    using Tiling = ListedTiling<kMaskUnit, 64>;
    HostWorkList<WorkListBuilder<Tiling, ListedCall>> const listed(
        listed_call(call, lists), sizes.batch, most_tiles(call, kMaskUnit));
    for (int i = 0; i < *listed.list.count; ++i) {
      WorkTile const& tile = listed.list.tiles[i];
      std::cout << tile.sequence.batch << ' ' << tile.first_row << ' ';
    }
    std::cout << '\\n';
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return host_program(tmp_path_factory.mktemp("listed_tiles"), MAIN, "-O1", *CHECKED)


def order(program, cases):
    """The tiles of each case: (batch, counts of (batch or 1, heads, units), seqlen_q, seqlen_k)."""
    numbers = [
        (batch, counts.shape[1], q, k, counts.numel(), *counts.flatten().tolist())
        for batch, counts, q, k in cases
    ]
    return [list(zip(x[::2], x[1::2], strict=True)) for x in program(numbers)]


def test_every_tile_once_and_the_longest_first(program):
    rng = random.Random(0)
    cases = []
    for _ in range(200):
        batch, heads, units = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 40)
        entries = rng.choice([1, batch])
        counts = torch.randint(0, rng.choice([2, 9, 400]), (entries, heads, units))
        cases.append((batch, counts, units * UNIT - rng.randrange(UNIT), 1000))
    cases.append((2, torch.zeros(0, 1, 3, dtype=torch.int64), 300, 0))  # no keys, no lists
    for (batch, counts, q, _), tiles in zip(cases, order(program, cases), strict=True):
        units = -(-q // UNIT)
        assert sorted(tiles) == [(b, u * UNIT) for b in range(batch) for u in range(units)]
        if counts.numel() == 0:
            continue
        of_first_head = counts[:, 0].expand(batch, -1)
        lengths = [int(of_first_head[b, row // UNIT]) for b, row in tiles]
        longest = max(lengths)
        classes = [(longest - x) * 32 // (longest + 1) for x in lengths]
        assert classes == sorted(classes)


def rounds(lengths, ctas):
    """What each CTA has, as CtaRounds of tile_scheduler.hpp deals places."""
    work, turns = [0] * ctas, list(range(ctas))
    for number, first in enumerate(range(0, len(lengths), ctas), start=1):
        for cta, turn in enumerate(turns):
            work[cta] += sum(lengths[first + turn : first + turn + 1])
        turns = [ctas - 1 - turn for turn in turns]
        if number % 2 == 0:
            turns = [(turn + ctas // 4) % ctas for turn in turns]
    return work


def test_documents_keep_all_multiprocessors_at_work(program):
    """12 of them in each of two sequences of 8k, 16 heads: in the order of their places the CTA
    with the most had 1.24 times the mean."""
    units, heads = 64, 16
    kinds = torch.full((2, 1, units, units), HIDDEN)
    for entry in range(2):
        starts = [0, *sorted(random.Random(entry).sample(range(1, units * UNIT), 11))]
        for unit in range(units):
            first = max(x for x in starts if x <= unit * UNIT) // UNIT
            kinds[entry, 0, unit, first : unit + 1] = HIDDEN + 1
    counts = block_lists(kinds).key_counts
    (tiles,) = order(program, [(2, counts, units * UNIT, units * UNIT)])
    lengths = [int(counts[b, 0, row // UNIT]) for b, row in tiles for _ in range(heads)]
    work = rounds(lengths, 132)
    assert sum(work) == sum(lengths) and max(work) < 1.05 * sum(work) / len(work)
