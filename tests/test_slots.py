"""How backward finds packed rows, and in what order key blocks add to dQ
(attention/backward/slots.hpp), against lists of all of them. The same functions run on the GPU.
Nothing here needs one."""

import random

import pytest
from host_program import CHECKED, host_program, needs_cxx

pytestmark = needs_cxx

NONE = -1000  # a limit of the mask that is not there
ROW_BYTES = 4096
ROW_STRIDES = (ROW_BYTES, ROW_BYTES, 2**34 - ROW_BYTES)  # of the coordinates of a packed row
MAIN = f"""
#include <iostream>
#include <vector>
#include "cute_kernels/attention/backward/slots.hpp"
using namespace cute_kernels::attention;

std::vector<int> read(int count) {{
  std::vector<int> values(count);
  for (int& value : values) std::cin >> value;
  return values;
}}

// A case: sequences, rows of q and of k, cu_seqlens and seqused of both, diagonals, limits of the
// mask, tile sizes. Answers a line for each sequence and one behind them, each with a query block's
// turns as (key block, turn), then the slots of all numbers.
int main() {{
  int sequences;
  while (std::cin >> sequences) {{
    AttentionCall call{{}};
    call.sizes.batch = sequences;
    call.sizes.heads_q = 3;
    std::cin >> call.packed.total_q >> call.packed.total_k;
    auto const starts_q = read(sequences + 1), starts_k = read(sequences + 1);
    auto const used_q = read(sequences), used_k = read(sequences), diagonal = read(sequences);
    auto const limits = read(2);
    if (limits[0] != {NONE}) call.mask.left = limits[0];
    if (limits[1] != {NONE}) call.mask.right = limits[1];
    int tile_m, keys;
    std::cin >> tile_m >> keys;
    call.packed.cu_seqlens_q = starts_q.data();
    call.packed.cu_seqlens_k = starts_k.data();
    call.packed.seqused_q = used_q.data();
    call.packed.seqused_k = used_k.data();
    if (sequences > 0 && diagonal[0] != {NONE}) call.packed.diagonal = diagonal.data();
    for (int entry = 0; entry <= sequences; ++entry) {{
      BackwardSequence const s = backward_sequence(call, entry, tile_m);
      std::cout << s.q.first << ' ' << s.q.rows << ' ' << s.q.used << ' ' << s.k.first << ' '
                << s.k.rows << ' ' << s.k.used << ' ' << s.first_query_block << ' '
                << s.hides_values();
      for (TmaRows const rows : {{s.tma_q, s.tma_k, s.tma_grad_k}}) {{
        std::cout << ' ' << rows.first << ' ' << rows.entry << ' ' << rows.wrap;
      }}
      for (int block = 0; block * keys < s.k.rows; ++block) {{
        BlockRange const queries = s.ranges.query_blocks(block * keys, keys, tile_m);
        for (int query = queries.begin; query < queries.end; ++query) {{
          std::cout << ' ' << query << ' ' << block << ' '
                    << turn_of(s.ranges, block, keys, query, tile_m);
        }}
      }}
      std::cout << '\\n';
    }}
    for (auto const& [slots, block] :
         {{std::pair(slots_of_q(call), tile_m), std::pair(slots_of_k(call), keys)}}) {{
      for (int number = 0; number < slots.blocks(block); ++number) {{
        int const slot = slots.slot_of(number, block);
        std::cout << slot << ' ' << number - slots.first_block(slot, block) << ' ';
      }}
      std::cout << '\\n';
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The C++ functions: lines of numbers for cases."""
    return host_program(tmp_path_factory.mktemp("slots"), MAIN, *CHECKED)


class Case:
    """Random packed lengths, a mask and tile sizes."""

    def __init__(self, chance: random.Random) -> None:
        self.sequences = chance.randint(0, 6)
        slots = [[chance.choice([0, 1, chance.randint(0, 40)]) for _ in range(self.sequences)]]
        slots += [[chance.choice([0, 1, chance.randint(0, 40)]) for _ in range(self.sequences)]]
        self.starts = [[sum(of[:i]) for i in range(self.sequences + 1)] for of in slots]
        self.used = [[chance.choice([n, chance.randint(0, n)]) for n in of] for of in slots]
        self.totals = [starts[-1] + chance.choice([0, 0, 1, 30]) for starts in self.starts]
        self.diagonal = [NONE] * self.sequences
        if chance.random() < 0.3:
            self.diagonal = [chance.randint(-30, 40) for _ in range(self.sequences)]
        self.left = chance.choice([NONE, 0, chance.randint(0, 30)])
        self.right = chance.choice([NONE, 0, chance.randint(0, 30)])
        self.tile_m, self.keys = chance.choice([4, 8]), chance.choice([4, 8, 16])

    def numbers(self) -> list[int]:
        return [
            *(self.sequences, *self.totals, *self.starts[0], *self.starts[1]),
            *(*self.used[0], *self.used[1], *self.diagonal),
            *(self.left, self.right, self.tile_m, self.keys),
        ]

    def slot(self, which: int, number: int) -> tuple[int, int, int]:
        """First row, rows and used rows of a slot of q (0) or k (1)."""
        first = self.starts[which][number]
        if number == self.sequences:
            return first, self.totals[which] - first, 0
        return first, self.starts[which][number + 1] - first, self.used[which][number]

    def sees(self, number: int, query: int, key: int) -> bool:
        at = query + self.used[1][number] - self.used[0][number]
        if self.diagonal[0] != NONE:
            at = query + self.diagonal[number]
        return (self.left == NONE or key >= at - self.left) and (
            self.right == NONE or key <= at + self.right
        )


def test_sequences_turns_and_numbers(program):
    chance = random.Random(7)
    cases = [Case(chance) for _ in range(400)]
    lines = iter(program([case.numbers() for case in cases]))
    contributions, first_key_blocks = 0, set()
    for case in cases:
        tile_m, keys = case.tile_m, case.keys
        for number in range(case.sequences + 1):
            q, k = case.slot(0, number), case.slot(1, number)
            answer = next(lines)
            assert answer[:7] == [*q, *k, q[0] // tile_m + number]
            pairs = [(i, j) for i in range(q[2]) for j in range(k[2])]
            seen = [(i, j) for i, j in pairs if case.sees(number, i, j)]
            if pairs:
                assert answer[7] == (len(seen) < len(pairs))
            # TMA: row i of those that begin at `first` is at `start` + i, as its coordinates add
            # up modulo 2^64 bytes, and the tensor ends behind the last one.
            for (start, count), total, at, entry, wrap in (
                (q[::2], case.totals[0], *answer[8:11]),
                (k[::2], case.totals[1], *answer[11:14]),
                (k[:2], case.totals[1], *answer[14:17]),
            ):
                assert at >= 0 and 0 <= entry <= total and 0 <= wrap <= 2**30
                address = sum(c * s for c, s in zip((at, entry, wrap), ROW_STRIDES, strict=True))
                assert address % 2**64 == start * ROW_BYTES
                assert at + count == 2**30
            turns = [tuple(answer[i : i + 3]) for i in range(17, len(answer), 3)]
            assert {(m, n) for m, n, _ in turns} == {(i // tile_m, j // keys) for i, j in seen}
            for m in {m for m, _, _ in turns}:
                in_order = sorted((n, turn) for of, n, turn in turns if of == m)
                assert [turn for _, turn in in_order] == list(range(len(in_order)))
                first_key_blocks.add(in_order[0][0])
            contributions += len(turns)
        for which, block in ((0, tile_m), (1, keys)):
            answer = next(lines)
            found = list(zip(answer[::2], answer[1::2], strict=True))
            with_rows = [(slot, b) for slot, b in found if b * block < case.slot(which, slot)[1]]
            assert all(b >= 0 for _, b in found)
            assert with_rows == [
                (slot, b)
                for slot in range(case.sequences + 1)
                for b in range(-(-case.slot(which, slot)[1] // block))
            ]
    assert next(lines, None) is None
    assert contributions > 1000 and len(first_key_blocks) > 2


def test_whatever_lengths_hold_slots_lie_inside(program):
    chance = random.Random(8)
    cases = []
    for _ in range(300):
        case = Case(chance)
        wild = [-(2**31), -1, 0, 5, 100, 2**31 - 1]
        case.starts = [[chance.choice(wild) for _ in of] for of in case.starts]
        case.used = [[chance.choice(wild) for _ in of] for of in case.used]
        cases.append(case)
    lines = iter(program([case.numbers() for case in cases]))
    for case in cases:
        for _ in range(case.sequences + 1):
            answer = next(lines)
            for (first, rows, used), total in zip(
                (answer[:3], answer[3:6]), case.totals, strict=True
            ):
                assert 0 <= first <= first + used <= first + rows <= total
            blocks = -(-answer[2] // case.tile_m)
            assert answer[6] >= 0
            assert answer[6] + blocks <= case.totals[0] // case.tile_m + case.sequences + 1
        for _ in range(2):
            answer = next(lines)
            assert all(
                slot <= case.sequences and b >= 0
                for slot, b in zip(answer[::2], answer[1::2], strict=True)
            )
