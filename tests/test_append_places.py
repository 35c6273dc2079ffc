"""Which row of a cache a new row goes to (cache/places.hpp): the device's arithmetic, here on the
host. Whatever lengths and tables hold, nothing else is touched."""

import random

import pytest
from host_program import CHECKED, host_program, needs_cxx
from packed import starts

pytestmark = needs_cxx

FAR = 2**31 - 1
MAIN = """
#include <iostream>
#include <vector>
#include "cute_kernels/cache/places.hpp"
using namespace cute_kernels::cache;

int number() {
  int value;
  std::cin >> value;
  return value;
}

std::vector<int> numbers() {
  std::vector<int> values(number());
  for (int& value : values) value = number();
  return values;
}

int const* pointer(std::vector<int> const& values) {
  return values.empty() ? nullptr : values.data();
}

void places_of_rows(int batch) {
  Tokens tokens{batch, 0, nullptr, 0};
  tokens.seqlen = number();
  tokens.total = number();
  std::vector<int> const cu_seqlens = numbers(), lengths = numbers(), table = numbers(),
                         index = numbers();
  tokens.cu_seqlens = pointer(cu_seqlens);
  Places places{pointer(table), 0, pointer(index), 0, 0, 0};
  places.pages = number();
  places.page_size = number();
  places.page_table_stride = batch == 0 ? 0 : static_cast<int64_t>(table.size()) / batch;
  places.capacity = number();
  for (int token = 0; token < tokens.total; ++token) {
    TokenPlace const of = place_of(tokens, token);
    CacheRow row{-1, 0};
    if (of.entry >= 0) row = cache_row(places, of.entry, int64_t{lengths[of.entry]} + of.index);
    if (row.page >= 0) std::cout << token << ' ' << row.page << ' ' << row.row << ' ';
  }
  std::cout << '\\n';
  for (int entry = 0; entry < batch; ++entry) {
    std::cout << length_after(places, lengths[entry], rows_of_entry(tokens, entry)) << ' ';
  }
  std::cout << '\\n';
}

int main(int argc, char**) {
  int first;
  while (std::cin >> first) {
    if (argc == 1) {
      places_of_rows(first);
      continue;
    }
    int const heads = number(), pairs = number();  // `first` is the head dim
    for (int i = 0; i < heads * units_of_head(first, pairs); ++i) {
      UnitPlace const unit = unit_place(first, pairs, i);
      std::cout << unit.head << ' ' << unit.channel << ' ' << unit.second_channel << ' ';
    }
    std::cout << '\\n';
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return host_program(tmp_path_factory.mktemp("places"), MAIN, *CHECKED)


def random_case(chance, garbage):
    """Fields of a case."""
    batch = chance.randint(0, 5)
    lengths = [chance.choice([0, 1, chance.randint(0, 40)]) for _ in range(batch)]
    added = [chance.choice([0, 1, chance.randint(0, 30)]) for _ in range(batch)]
    seqlen, cu_seqlens = 0, starts(added)
    total = cu_seqlens[-1] + chance.choice([0, 3])
    if chance.random() < 0.4:
        seqlen, cu_seqlens, added = (x := chance.randint(0, 9)), [], [x] * batch
        total = seqlen * batch
    table, index = [], []
    page_size, columns, pages = chance.choice([1, 2, 16, 100]), chance.randint(0, 9), 7
    capacity = page_size
    if chance.random() < 0.6 and columns and batch:
        pages = batch * columns + 2
        table = chance.sample(range(pages), batch * columns)
        capacity *= columns
    elif chance.random() < 0.5:
        index = chance.sample(range(pages), batch)
    if garbage:
        wild = [-1, -(2**31), FAR, FAR - 1, 3, 50]
        lengths, table, index, cu_seqlens = (
            [chance.choice([n, n, *wild]) for n in numbers]
            for numbers in (lengths, table, index, cu_seqlens)
        )
    return batch, seqlen, total, cu_seqlens, lengths, table, index, pages, page_size, capacity


def written(case):
    """(token, page, row) of each new row that has a place, and the lengths afterwards."""
    batch, seqlen, _, cu_seqlens, lengths, table, index, pages, page_size, capacity = case
    rows, after = [], []
    for b in range(batch):
        first, last = b * seqlen, (b + 1) * seqlen
        if cu_seqlens:
            first, last = cu_seqlens[b : b + 2]
        for i in range(last - first):
            row = lengths[b] + i
            if not 0 <= row < capacity:
                continue
            page, place = b, row
            if table:
                page = table[b * (len(table) // batch) + row // page_size]
                place = row % page_size
            elif index:
                page = index[b]
            if 0 <= page < pages:
                rows.append((first + i, page, place))
        after.append(min(max(lengths[b] + last - first, 0), capacity))
    return rows, after


def fields(case):
    """As the program reads it: lists behind their lengths."""
    return [n for x in case for n in ([len(x), *x] if isinstance(x, list) else [x])]


def triples(numbers):
    return list(zip(*[iter(numbers)] * 3, strict=True))


def test_random_places(program):
    chance = random.Random(0)
    cases = [random_case(chance, garbage=False) for _ in range(400)]
    answers = program(map(fields, cases))
    for case, rows, after in zip(cases, answers[::2], answers[1::2], strict=True):
        assert (sorted(triples(rows)), after) == (sorted(written(case)[0]), written(case)[1])


def test_garbage_leads_nowhere(program):
    """Every row that is written lies in the cache and comes from a token of its own; rows of tokens
    whose starts are right are where they belong."""
    chance = random.Random(1)
    cases = [random_case(chance, garbage=True) for _ in range(800)]
    answers = program(map(fields, cases))
    compared = 0
    for case, rows, after in zip(cases, answers[::2], answers[1::2], strict=True):
        *_, cu_seqlens, _, _, _, pages, page_size, capacity = case
        found = triples(rows)
        assert all(0 <= page < pages and 0 <= row < page_size for _, page, row in found)
        assert len({token for token, _, _ in found}) == len(found)
        assert all(0 <= length <= capacity for length in after)
        if cu_seqlens == sorted(cu_seqlens) and (cu_seqlens or [0])[0] == 0:
            total = case[2]
            if not cu_seqlens or cu_seqlens[-1] <= total:
                compared += 1
                assert sorted(found) == sorted(written(case)[0])
                assert after == written(case)[1]
    assert compared > 100


def test_units_cover_a_row_once(program):
    sizes = [
        (head_dim, heads, pairs)
        for head_dim in (8, 16, 40, 64, 128, 192, 256)
        for heads in (1, 3)
        for pairs in range(0, head_dim // 2 + 1, 8)
    ]
    for (head_dim, heads, pairs), numbers in zip(sizes, program(sizes, "units"), strict=True):
        seen = []
        for head, channel, second in triples(numbers):
            seen += [head * head_dim + channel + i for i in range(8)]
            if second >= 0:
                assert second == channel + pairs
                seen += [head * head_dim + second + i for i in range(8)]
        assert sorted(seen) == list(range(heads * head_dim))
