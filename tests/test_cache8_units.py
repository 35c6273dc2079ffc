"""Scores of a cache of 8 bits that stay multiples of their row's unit (softmax.hpp in
attention/decode), compiled for the host, against scores that are multiplied by it. Nothing here
needs a GPU."""

import math
import random

import pytest
from host_program import host_program, needs_cxx
from softmax_headers import STAND_INS

pytestmark = needs_cxx

COLUMNS = 8
HEADERS = {
    "cutlass/cutlass.h": """
#pragma once
#include <cmath>
#define CUTLASS_DEVICE inline
#define CUTLASS_PRAGMA_UNROLL
inline bool __any_sync(unsigned, bool x) { return x; }
inline float __shfl_xor_sync(unsigned, float x, int) { return x; }
""",
    **STAND_INS,
}
MAIN = f"""
#include <cstdio>
#include <iostream>

#include "cute_kernels/attention/decode/softmax.hpp"
using cute_kernels::attention::RunningSoftmax;

struct Scores {{
  static constexpr int kRows = 2, kColumns = {COLUMNS};
  float x[kRows][kColumns];
  float& operator()(int row, int col) {{ return x[row][col]; }}
}};

// Of every case: the scale, two units, the number of blocks and their products. For each row what
// is known of it at the end with and without units.
int main() {{
  double scale, unit[2];
  int blocks;
  while (std::cin >> scale >> unit[0] >> unit[1] >> blocks) {{
    RunningSoftmax<2, 2, true> of_units(scale);
    RunningSoftmax<2, 2> plain(scale);
    float const units[2] = {{float(unit[0]), float(unit[1])}};
    of_units.begin_units(units);
    for (int block = 0; block < blocks; ++block) {{
      Scores products, scores;
      for (int i = 0; i < 2 * Scores::kColumns; ++i) {{
        double x;
        std::cin >> x;
        bool const hidden = x > 1e30;
        int const row = i / Scores::kColumns, col = i % Scores::kColumns;
        products(row, col) = hidden ? -INFINITY : float(x);
        scores(row, col) = hidden ? -INFINITY : float(x) * units[row];
      }}
      float factor[2];
      of_units.update(products, factor);
      plain.update(scores, factor);
    }}
    of_units.end_units(units, scale);
    for (int row = 0; row < 2; ++row) {{
      std::printf("%.9g %.9g %.9g %.9g ", of_units.most(row), of_units.sum(row), plain.most(row),
                  plain.sum(row));
    }}
    std::printf("\\n");
  }}
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    for name, text in HEADERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return host_program(folder, MAIN, "-O1", "-I", ".")


HIDDEN = 1e31
UNITS = (1.0, 0.37, 3e-4, 2.0**-17, 2.0**-60, 2.0**-126, 2.0**-140, 0.0)


@pytest.mark.parametrize("unit", UNITS)
def test_statistics_are_those_of_scores(program, unit):
    """Small units, subnormal ones and 0 among them, do not make NaN of what is hidden."""
    chance = random.Random(str(unit))
    cases = []
    for _ in range(50):
        blocks = chance.randrange(1, 4)
        size = chance.choice((1, 30 / unit if unit > 1e-8 else 2.0**30))
        hides = chance.choice((0, 0.5, 1))
        products = [
            HIDDEN if chance.random() < hides else chance.uniform(-size, size)
            for _ in range(blocks * 2 * COLUMNS)
        ]
        scale = 0.0884 * math.log2(math.e)
        cases.append([scale, unit, unit / 2, blocks, *products])
    for case, found in zip(cases, program(cases, number=float), strict=True):
        for most, total, true_most, true_total in zip(*[iter(found)] * 4, strict=True):
            assert most == pytest.approx(true_most, rel=1e-6), case
            assert total == pytest.approx(true_total, rel=1e-4), case
