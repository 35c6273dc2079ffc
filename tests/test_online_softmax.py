"""Forward's online softmax (attention/forward/softmax.hpp), compiled for the host: the 32 lanes of
a warp, which meet where they vote and shuffle, walk over blocks of scores as mainloop.hpp has them,
against a softmax in fp64. Nothing here needs a GPU."""

import math
import random
import struct

import pytest
import torch
from host_program import host_program, needs_cxx
from softmax_headers import STAND_INS

pytestmark = needs_cxx

ROWS, CHANNELS = 16, 4
NONE = 1 << 30  # no left end
LOG2E = 1.4426950408889634
HEADERS = {
    "cutlass/cutlass.h": """
#pragma once
#include <cmath>
#define CUTLASS_DEVICE inline
#define CUTLASS_PRAGMA_UNROLL
bool __any_sync(unsigned, bool);
float __shfl_xor_sync(unsigned, float, int);
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
""",
    **STAND_INS,
}
MAIN = (
    f"""
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <vector>

#include "cute_kernels/attention/forward/softmax.hpp"
using cute_kernels::attention::OnlineSoftmax;

constexpr int kRowsOfWarp = {ROWS}, kChannels = {CHANNELS};
"""
    + """
// Lanes run one after the other, each up to where all meet.
struct Warp {
  ucontext_t caller, lanes[32];
  std::vector<char> stacks[32];
  bool done[32];
  int lane, meetings[32];
  float told[2][32];
  std::function<void(int)> run;
} warp;

void next_lane() {
  int const from = warp.lane;
  for (int i = 1; i <= 32; ++i) {
    int const lane = (from + i) % 32;
    if (warp.done[lane]) continue;
    warp.lane = lane;
    if (lane != from) swapcontext(&warp.lanes[from], &warp.lanes[lane]);
    return;
  }
  swapcontext(&warp.lanes[from], &warp.caller);
}
float const* meet(float own) {
  int const lane = warp.lane, number = warp.meetings[lane]++;
  warp.told[number % 2][lane] = own;
  next_lane();
  for (int other : warp.meetings) {
    if (other <= number) std::abort();  // some lane is elsewhere
  }
  return warp.told[number % 2];
}
bool __any_sync(unsigned, bool own) {
  bool any = false;
  float const* const told = meet(own);
  for (int i = 0; i < 32; ++i) any |= told[i] != 0.f;
  return any;
}
float __shfl_xor_sync(unsigned, float own, int lanes) {
  int const from = warp.lane ^ lanes;
  return meet(own)[from];
}
void begin_lane() {
  warp.run(warp.lane);
  warp.done[warp.lane] = true;
  next_lane();
}
void run_warp(std::function<void(int)> const& run) {
  warp.run = run;
  for (int i = 0; i < 32; ++i) {
    warp.done[i] = false;
    warp.meetings[i] = 0;
    warp.stacks[i].resize(1 << 16);
    ucontext_t& context = warp.lanes[i];
    getcontext(&context);
    context.uc_stack.ss_sp = warp.stacks[i].data();
    context.uc_stack.ss_size = warp.stacks[i].size();
    makecontext(&context, begin_lane, 0);
  }
  warp.lane = 0;
  swapcontext(&warp.caller, &warp.lanes[0]);
}

// ForwardTraits::ProbabilityRange.
struct OfBfloat16 {
  static constexpr float kShift = 40.f, kLargest = 1.f, kHuge = 0x1p14f, kMargin = 10.f;
};
struct OfHalf {
  static constexpr float kShift = 0.f, kLargest = 0x1p15f, kHuge = 0x1p10f, kMargin = 0.f;
};

template <int kColumns_>
struct Fragment {
  static constexpr int kRows = 2, kColumns = kColumns_;
  float elements[kRows][kColumns] = {};
  float& operator()(int row, int col) { return elements[row][col]; }
  float const& operator()(int row, int col) const { return elements[row][col]; }
};

float of_bits(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
std::vector<float> read_floats(int count) {
  std::vector<float> numbers(count);
  for (float& x : numbers) {
    int bits;
    std::cin >> bits;
    x = of_bits(bits);
  }
  return numbers;
}

struct Case {
  int keys, first_end, left;  // of row 0: the end of its keys; how many keys before it, or NONE
  float scale_log2, sink;
  bool sink_of_rows;  // which are asked one by one
  std::vector<float> scores, values;

  int end(int row) const { return std::min(keys, first_end + row); }
  int first(int row) const { return std::max(0, first_end + row - left); }
  // To NaN, of which no origin makes less.
  bool is_lost(int row) const {
    bool lost = false;
    for (int key = first(row); key < end(row); ++key) {
      float const score = scores[row * keys + key];
      lost |= std::isnan(score) || score == INFINITY;
    }
    return lost;
  }
};

template <class Range, int kTileN, bool kInPairs>
void attend(Case const& given) {
  static float results[kRowsOfWarp][kChannels + 1];
  run_warp([&](int lane) {
    using Softmax = OnlineSoftmax<2, Range, kInPairs>;
    constexpr int kColumns = kTileN / 4, kSeekNoMore = 1 << 30;
    Softmax softmax(given.scale_log2);
    Fragment<kColumns> scores;
    Fragment<kChannels> out;
    auto each = [&](int block, auto visit) {
      for (int i = 0; i < 2 * kColumns; ++i) {
        int const row = i / kColumns, col = i % kColumns;
        int const key = block * kTileN + lane % 4 * 2 + col / 2 * 8 + col % 2;
        visit(lane / 4 + 8 * row, key, scores(row, col), row);
      }
    };
    auto bring = [&](int block) {
      each(block, [&](int row, int key, float& score, int) {
        score = key < given.keys ? given.scores[row * given.keys + key] : 0.f;
      });
    };
    bool const has_left = given.left < kSeekNoMore;
    int const sought = Softmax::kHasMargin ? 1 : 16;
    int seek_from = std::max(0, given.end(0) - sought) / kTileN;
    int const seek_before = (given.first(kRowsOfWarp - 1) + kTileN - 1) / kTileN;
    int const blocks = (given.keys + kTileN - 1) / kTileN;
    for (int block = blocks - 1; block >= 0; --block) {
      bring(block);
      bool const seek =
          block == blocks - 1 || block >= seek_from || (has_left && block < seek_before);
      auto few = [&] { return given.end(0) - 16 < block * kTileN; };
      auto mask = [&] {
        each(block, [&](int row, int key, float& score, int) {
          if (key >= given.end(row) || (has_left && key < given.first(row))) score = -INFINITY;
        });
      };
      auto overflow = [&] {
        bring(block);
        bool const first = Softmax::kHasMargin && seek_from < kSeekNoMore;
        seek_from = first ? kSeekNoMore : 2 * block - (blocks - 1) - 1;
      };
      softmax.update(
          scores, seek, few, mask, [](auto const& exponentiate) { exponentiate(); }, overflow,
          [&](auto const& factors) { Softmax::scale_rows(out, factors); });
      Fragment<kChannels> product;
      each(block, [&](int row_of_warp, int key, float& p, int row) {
        if (p > Range::kLargest && !given.is_lost(row_of_warp)) std::abort();
        for (int i = 0; i < kChannels; ++i) {
          if (key < given.keys) product(row, i) += p * given.values[key * kChannels + i];
        }
      });
      for (int i = 0; i < 2 * kChannels; ++i) {
        float sum = product(i / kChannels, i % kChannels);
        for (int lanes = 1; lanes <= 2; ++lanes) sum += __shfl_xor_sync(~0u, sum, lanes);
        out(i / kChannels, i % kChannels) += sum;
      }
    }
    if (given.sink_of_rows) {
      float const sinks[] = {given.sink, given.sink};
      softmax.finalize(out, sinks);
    } else {
      softmax.finalize(out, given.sink);
    }
    for (int row = 0; row < 2; ++row) {
      float* const result = results[lane / 4 + 8 * row];
      for (int i = 0; i < kChannels; ++i) result[i] = out(row, i);
      result[kChannels] = softmax.lse(row, given.sink);
    }
  });
  for (auto const& row : results) {
    for (float x : row) std::printf("%.9g ", x);
  }
  std::printf("\\n");
}

int main() {
  Case given;
  int kind;
  while (std::cin >> kind >> given.keys >> given.first_end >> given.left) {
    auto const numbers = read_floats(2);
    given.scale_log2 = numbers[0];
    given.sink = numbers[1];
    given.scores = read_floats(kRowsOfWarp * given.keys);
    given.values = read_floats(given.keys * kChannels);
    given.sink_of_rows = kind >= 4;
    switch (kind % 4) {
      case 0: attend<OfBfloat16, 64, true>(given); break;
      case 1: attend<OfHalf, 64, true>(given); break;
      case 2: attend<OfBfloat16, 16, false>(given); break;
      case 3: attend<OfHalf, 16, false>(given); break;
    }
  }
}
"""
)


@pytest.fixture(scope="module")
def attend(tmp_path_factory):
    """O (rows, channels) and LSE of cases (kind, keys, first_end, left, scale_log2, sink, scores,
    values)."""
    folder = tmp_path_factory.mktemp("softmax")
    for name, text in HEADERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    program = host_program(folder, MAIN, "-O1", "-I", ".")

    def bits(numbers):
        flat = torch.as_tensor(numbers, dtype=torch.float32).flatten().tolist()
        return struct.unpack(f"{len(flat)}i", struct.pack(f"{len(flat)}f", *flat))

    def run(cases):
        lines = program(
            [(*case[:4], *(n for x in case[4:] for n in bits(x))) for case in cases], number=float
        )
        for line in lines:
            rows = torch.tensor(line, dtype=torch.float64).view(ROWS, CHANNELS + 1)
            yield rows[:, :-1], rows[:, -1]

    return run


def random_scores(chance, keys, block, unit):
    """Near one another or far apart, by block, by row or alone, of every size; in powers of two
    times `unit`."""
    normal = torch.randn(ROWS, keys, dtype=torch.float64)
    number = torch.arange(keys) // block
    row = torch.arange(ROWS)[:, None]
    level = torch.randn(ROWS, 1, dtype=torch.float64) * 10 ** chance.uniform(0, 30)
    alone = torch.rand(ROWS, keys) < 0.02
    far = 10 ** chance.uniform(0, 30)
    scores = chance.choice(
        [
            normal * 10 ** chance.uniform(-1, 2),
            normal - 32 * chance.random() * number,  # rises along the walk
            normal + 32 * number,
            normal - 32 * number * (row % 3),
            normal + level,
            normal + far * alone,
            normal - far * alone,
            level * (1 + number % 3 * 1e-3) + normal,
            2.0**24 * (1 + row) + (40 * normal).round(),
            normal.masked_fill(torch.rand(ROWS, keys) < 0.3, -math.inf),
            -level * torch.arange(1, keys + 1),
        ]
    )
    return (scores * unit).clamp(-3.4e38, 3.4e38).where(scores > -math.inf, -math.inf).float()


def random_case(chance):
    kind = chance.randrange(8)
    block = 64 if kind % 4 < 2 else 16
    keys = chance.randint(1, 10 * block if block == 16 else 5 * block)
    scales = [0.18, 0.18, 0.18, 1e-3, 2.0**-100, 1e4, 1e20, 2.0**126]
    scale_log2 = torch.tensor(chance.choice(scales)).item()
    unit = 1 / scale_log2 if chance.random() < 0.8 else 1.0  # scaled, some are beyond a float
    scores = random_scores(chance, keys, block, min(unit, 1e36))
    if chance.random() < 0.5:  # in some rows, of which some are hidden
        rows = torch.rand(ROWS, 1) < 0.3
        wild = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, scores.shape)]
        scores = scores.where(~(rows & (torch.rand(scores.shape) < 0.03)), wild)
    first_end = chance.choice([NONE - ROWS, chance.randint(-10, keys)])
    left = chance.choice([NONE, NONE, chance.randint(1, keys)])
    sink = chance.choice([-math.inf, -math.inf, chance.gauss(0, 10 ** chance.uniform(0, 4))])
    values = torch.randn(keys, CHANNELS)
    return kind, keys, first_end, left, scale_log2, sink, scores, values


def right(keys, first_end, left, scale_log2, sink, scores, values):
    """O, its |P| |V|, LSE, and which rows are lost to NaN and infinity."""
    end = first_end + torch.arange(ROWS)[:, None]
    key = torch.arange(keys)
    sees = (key < end) & ((key >= end - left) if left < NONE else True)
    lost = (sees & (scores.isnan() | (scores == math.inf))).any(1)
    powers = (scores.double() * scale_log2).where(sees, -math.inf)
    most = powers.amax(1, keepdim=True).clamp_min(sink * LOG2E)
    p = (powers - most).exp2().nan_to_num(0.0)
    total = p.sum(1) + (sink * LOG2E - most[:, 0]).exp2().nan_to_num(0.0)
    p = (p / total[:, None]).nan_to_num(0.0)
    lse = (most[:, 0] + total.log2()) / LOG2E
    return p @ values.double(), p @ values.double().abs(), lse, lost


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_right_whatever_the_others_are(attend, seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    cases = [random_case(chance) for _ in range(40)]
    spoilt = 0
    for case, (out, lse) in zip(cases, attend(cases), strict=True):
        exact, weight, exact_lse, lost = right(*case[1:])
        spoilt += int(lost.sum())
        assert out[lost].isnan().all()
        # P is as exact as its exponent, which here may be rounded at 2^14 before the offset is
        # subtracted, and may be 2^-50 of what is flushed to 0.
        allowed = 4e-4 * weight + 1e-6
        assert ((out - exact).abs() <= allowed)[~lost].all(), case[:6]
        # In powers of two, as kernels have it, LSE is beyond a float before it is so.
        infinite = exact_lse.abs() * LOG2E > torch.finfo(torch.float32).max
        near = (lse - exact_lse).abs() <= 1e-5 + 3e-7 * exact_lse.abs()
        near |= infinite & (lse == exact_lse.sign() * math.inf)
        assert near[~lost].all(), case[:6]
    assert spoilt > 0
