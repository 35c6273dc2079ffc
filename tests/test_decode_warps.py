"""How warps share a part of a cache of 8 bits (attention/decode/fp8_warps_part.hpp). Nothing here
needs a GPU."""

from collections import Counter

import pytest
from host_program import CHECKED, host_program, needs_cxx

pytestmark = needs_cxx

WARPS, ROWS = 8, 16
KEYS = (32, 8)  # of a slice; the fewer where a part has few
MAIN = f"""
#include <iostream>
#include "cute_kernels/attention/decode/fp8_warps_part.hpp"
using namespace cute_kernels::attention;

template <int kTileN, int kKeys>
void share(int rows, int blocks) {{
  using Part = WarpPart<{WARPS}, kTileN, kKeys>;
  std::cout << Part::kMostTurns;
  for (int warp = 0; warp < {WARPS}; ++warp) {{
    Part const part(rows, warp);
    for (int slice = part.slice; slice < blocks * Part::kSlices; slice += part.step) {{
      std::cout << ' ' << warp << ' ' << part.first_row << ' ' << part.first_warp() << ' '
                << part.slice << ' ' << slice << ' '
                << (part.ends_block(slice) ? part.arrivals : 0);
    }}
  }}
  std::cout << '\\n';
}}

template <int kTileN>
void share(int keys, int rows, int blocks) {{
  if (keys == {KEYS[0]}) share<kTileN, {KEYS[0]}>(rows, blocks);
  if (keys == {KEYS[1]}) share<kTileN, {KEYS[1]}>(rows, blocks);
}}

int main() {{
  int tile_n, keys, rows, blocks;
  while (std::cin >> tile_n >> keys >> rows >> blocks) {{
    if (tile_n == 32) share<32>(keys, rows, blocks);
    if (tile_n == 64) share<64>(keys, rows, blocks);
    if (tile_n == 128) share<128>(keys, rows, blocks);
  }}
}}
"""


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("tile_n", [32, 64, 128])
def test_every_row_and_slice_is_one_warps(tmp_path, tile_n, keys):
    """And every block is freed by as many arrivals as there are warps, in turns as long as said."""
    cases = [
        (tile_n, keys, rows, blocks)
        for rows in range(1, WARPS * ROWS + 1)
        for blocks in (1, 2, 5, 19)
    ]
    answers = host_program(tmp_path, MAIN, "-O1", *CHECKED)(cases)
    for (*_, rows, blocks), (most_turns, *values) in zip(cases, answers, strict=True):
        slices = tile_n // keys
        covered, freed, last = Counter(), Counter(), {}
        for i in range(0, len(values), 6):
            warp, first_row, first_warp, own, number, arrivals = values[i : i + 6]
            covered[first_row, number] += 1
            freed[number // slices] += arrivals
            assert warp == first_warp + own
            assert number // slices - last.get(warp, -1) <= most_turns
            last[warp] = number // slices
        groups = range(0, max(first for first, _ in covered) + 1, ROWS)
        assert len(groups) * ROWS >= rows
        assert len(groups) == 1 or len(groups) // 2 * ROWS < rows
        assert covered == Counter((row, n) for row in groups for n in range(blocks * slices))
        assert freed == Counter(dict.fromkeys(range(blocks), WARPS))
