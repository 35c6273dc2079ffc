"""Which tiles each CTA of a forward kernel has (attention/tile_scheduler.hpp,
attention/schedule/list_scheduler.hpp), for all small calls: the functions that run on the GPU, here
CTA after CTA. Nothing here needs one."""

import itertools
from collections import Counter

import pytest
from host_program import CHECKED, host_program, needs_cxx

pytestmark = needs_cxx

NEIGHBOURS = (2, 4)
# What the headers have of CUDA
STUB = """
#pragma once
#define CUTLASS_DEVICE inline
inline struct { int x = 0; } blockIdx, gridDim;
namespace cutlass {
struct FastDivmod {
  int divisor = 1;
  FastDivmod() = default;
  explicit FastDivmod(int divisor) : divisor(divisor) {}
  int div(int dividend) const { return dividend / divisor; }
  void operator()(int& quotient, int& remainder, int dividend) const {
    quotient = dividend / divisor;
    remainder = dividend % divisor;
  }
};
}  // namespace cutlass
"""
MAIN = f"""
#include <iostream>
#include "cute_kernels/attention/schedule/list_scheduler.hpp"
using namespace cute_kernels::attention;

// Of each CTA its tiles, behind how many numbers these are.
template <class Scheduler, class Print>
void deal(typename Scheduler::Params const& params, int ctas, Print const& print) {{
  gridDim.x = ctas;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {{
    for (Scheduler tile(params); tile.valid(); tile.advance()) print(tile.coord());
    std::cout << "-1 ";
  }}
  std::cout << '\\n';
}}

template <int kNeighbours, bool kMovesOn>
void deal_listed(int count, int heads, int ctas) {{
  using Scheduler = ListScheduler<kNeighbours, kMovesOn>;
  WorkList list{{&count, nullptr, nullptr, count}};
  deal<Scheduler>(Scheduler::make_params(list, heads), ctas, [](ListedTile const& tile) {{
    std::cout << tile.entry << ' ' << tile.head << ' ';
  }});
}}

int main() {{
  int neighbours;
  while (std::cin >> neighbours) {{
    if (neighbours > 0) {{
      int moves_on, count, heads, ctas;
      std::cin >> moves_on >> count >> heads >> ctas;
      auto deal_listed = [&](auto on) {{
        if (neighbours == {NEIGHBOURS[0]}) ::deal_listed<{NEIGHBOURS[0]}, on()>(count, heads, ctas);
        if (neighbours == {NEIGHBOURS[1]}) ::deal_listed<{NEIGHBOURS[1]}, on()>(count, heads, ctas);
      }};
      moves_on ? deal_listed(std::true_type()) : deal_listed(std::false_type());
    }} else {{
      CallSizes sizes{{}};
      bool causal;
      int tile_m, ctas;
      int64_t kv_bytes;
      std::cin >> sizes.batch >> sizes.heads_q >> sizes.seqlen_q >> causal >> tile_m >> kv_bytes >>
          ctas;
      auto const params = TileScheduler::make_params(sizes, causal, tile_m, kv_bytes, ctas);
      deal<TileScheduler>(params, ctas, [](TileCoord const& tile) {{
        std::cout << tile.m_block << ' ' << tile.head << ' ' << tile.batch << ' ';
      }});
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dealing")
    (folder / "cutlass").mkdir()
    (folder / "cutlass" / "fast_math.h").write_text(STUB)
    return host_program(folder, MAIN, "-I", folder, "-O1", *CHECKED)


def of_ctas(line, size):
    """The tiles of each CTA."""
    ctas, tiles = [], []
    numbers = iter(line)
    for first in numbers:
        if first < 0:
            ctas.append(tiles)
            tiles = []
        else:
            tiles.append((first, *itertools.islice(numbers, size - 1)))
    assert not tiles
    return ctas


def check(ctas, expected):
    """Each tile once, and no CTA has two more than another."""
    assert Counter(itertools.chain(*ctas)) == Counter(expected)
    counts = [len(tiles) for tiles in ctas]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("moves_on", [0, 1])
@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_every_listed_tile_and_head_once(program, neighbours, moves_on):
    """Whatever part of a group of neighbours the last ones are."""
    cases = list(itertools.product(range(15), range(1, 8), (1, 2, 3, 4, 5, 7, 8, 13)))
    lines = program([(neighbours, moves_on, *case) for case in cases])
    for (count, heads, number), line in zip(cases, lines, strict=True):
        ctas = of_ctas(line, 2)
        assert len(ctas) == number
        check(ctas, itertools.product(range(count), range(heads)))


def test_every_tile_of_a_dense_call_once(program):
    cases = list(
        itertools.product(
            (1, 2, 3), (1, 2, 5), (1, 64, 65, 500, 2000), (0, 1), (64, 192), (1, 2**40), (1, 3, 8)
        )
    )
    for case, line in zip(cases, program([(0, *case) for case in cases]), strict=True):
        batch, heads, seqlen_q, _, tile_m, _, number = case
        ctas = of_ctas(line, 3)
        assert len(ctas) == number
        m_blocks = -(-seqlen_q // tile_m)
        check(ctas, itertools.product(range(m_blocks), range(heads), range(batch)))
