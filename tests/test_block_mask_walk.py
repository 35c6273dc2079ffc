"""What kernels make of a block mask's lists (attention/forward/key_walk.hpp, backward/steps.hpp),
compiled for this machine: every listed block is walked once, in order. Nothing here needs a GPU."""

import random

import pytest
import torch
from block_masks import random_kinds
from configure import ROOT
from host_program import CHECKED, host_program, needs_cxx

from cute_kernels.variants.block_mask import block_lists

pytestmark = needs_cxx

# What the headers have of CUDA
STUB = """
#pragma once
#include <cstdint>
#include <type_traits>
#define CUTLASS_DEVICE inline
#define CUTLASS_HOST_DEVICE inline
namespace cutlass { constexpr int NumThreadsPerWarp = 1; }
struct { int x = 0; } const threadIdx;
template <class T> T __ldg(T const* p) { return *p; }
inline int __shfl_sync(unsigned, int value, int) { return value; }
"""
STEPS = "cute_kernels/attention/backward/steps.hpp"
MAIN = """
#include <iostream>
#include <vector>
#include "cutlass/cutlass.h"
#include "cute_kernels/attention/forward/key_walk.hpp"
namespace cute_kernels::attention {
enum class Caller { kWarp, kThread };
template <Caller> int of_caller(int value) { return value; }
}
#include "steps.hpp"
using namespace cute_kernels::attention;

struct KeyBlock {
  int n_block;
  int kv_head;
  BlockRange queries;
  struct { int batch; } sequence;
  template <class Params>
  int64_t first_query_block(Params const& params, int head) const {
    return (sequence.batch * params.heads + head) * params.workspace.m_blocks.divisor;
  }
};
template <int kTileN_>
struct Traits {
  struct Variant { static constexpr bool kHasBlockMask = true, kHides = true; };
  using KeyBlock = ::KeyBlock;
  static constexpr bool kAnyCall = true;
  static constexpr int kTileM = 64, kTileN = kTileN_, kCluster = kMaskUnit / kTileN;
};
struct Params {
  int heads, heads_per_kv;
  struct { struct { int divisor; } m_blocks; } workspace;
  struct { BlockLists blocks; } variant;
};

template <int kTileN>
void print_steps(Params const& params, KeyBlock const& keys) {
  auto print = [](auto step, auto const& turn_of) {
    for (; step.valid(); step.advance()) {
      for (int64_t value : {int64_t{step.head()}, int64_t{step.block()}, int64_t{step.is_full()},
                            int64_t{turn_of(step)}, step.block_index()}) {
        std::cout << value << ' ';
      }
    }
    std::cout << '\\n';
  };
  print(QuerySteps<Traits<kTileN>, Params, Caller::kThread>(params, keys),
        [](auto const& step) { return step.turn(); });
  print(QuerySteps<Traits<kTileN>, Params, Caller::kWarp>(params, keys),
        [](auto const&) { return -1; });
}

template <int kTileN>
void print_walk(BlockRow const& row) {
  ListWalk<kTileN> const walk(row);
  for (int place = walk.places.end - 1; place >= walk.places.begin; --place) {
    std::cout << walk.block(place) << ' ' << walk.entry(place).is_full() << ' ';
  }
  std::cout << '\\n';
}

int main() {
  int batch, heads, group, batches, of_heads, queries, keys, m_blocks;
  while (std::cin >> batch >> heads >> group >> batches >> of_heads >> queries >> keys >>
         m_blocks) {
    auto read = [&](int count) {
      std::vector<int> values(batches * of_heads * count);
      for (int& value : values) std::cin >> value;
      return values;
    };
    auto const key_counts = read(queries), listed_keys = read(queries * keys),
               query_counts = read(keys), listed_queries = read(queries * keys),
               turns = read(queries * keys);
    auto rows_of = [&](int units) {
      return std::pair(batches == 1 ? 0 : of_heads * units, of_heads == 1 ? 0 : units);
    };
    auto const [q_batch, q_head] = rows_of(queries);
    auto const [k_batch, k_head] = rows_of(keys);
    BlockLists const forward{key_counts.data(), listed_keys.data(), nullptr, q_batch, q_head, keys};
    BlockLists const backward{query_counts.data(), listed_queries.data(), turns.data(), k_batch,
                              k_head, queries};
    for (int entry = 0; entry < batch; ++entry) {
      for (int head = 0; head < heads; ++head) {
        for (int unit = 0; unit < queries; ++unit) {
          print_walk<128>(BlockRow(forward, entry, head, unit));
          print_walk<64>(BlockRow(forward, entry, head, unit));
        }
      }
    }
    Params const params{heads, group, {{m_blocks}}, {backward}};
    for (int entry = 0; entry < batch; ++entry) {
      for (int kv_head = 0; kv_head < heads / group; ++kv_head) {
        for (int unit = 0; unit < keys; ++unit) {
          print_steps<128>(params, {unit, kv_head, {}, {entry}});
          print_steps<64>(params, {2 * unit, kv_head, {}, {entry}});
          print_steps<64>(params, {2 * unit + 1, kv_head, {}, {entry}});
        }
      }
    }
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    (folder / "cutlass").mkdir()
    (folder / "cutlass" / "cutlass.h").write_text(STUB)
    lines = (ROOT / STEPS).read_text().splitlines()
    without_includes = [line for line in lines if not line.startswith("#include")]
    (folder / "steps.hpp").write_text("\n".join(without_includes))
    return host_program(folder, MAIN, "-I", folder, *CHECKED)


def test_every_listed_block_is_walked_once(program):
    for seed in range(40):
        chance = random.Random(seed)
        batch, group = chance.choice([1, 2]), chance.choice([1, 2, 3])
        heads, queries, keys = group * chance.choice([1, 2]), chance.choice([1, 5, 9]), 4
        shape = (chance.choice([1, batch]), chance.choice([1, heads]), queries, keys)
        kinds = random_kinds(shape, seed)
        beyond = chance.choice([0, 1, 2, 3])  # the last block of the mask may, which has some units
        if beyond > 1:
            kinds[:, :, -2:] = kinds[:, :, -1:]
        m_blocks = max(1, 2 * queries - beyond)
        lists = [n for x in block_lists(kinds) for n in x.flatten().tolist()]
        lines = iter(program([[batch, heads, group, *shape, m_blocks, *lists]]))
        kinds = kinds.expand(batch, heads, -1, -1)
        for entry, head, i in torch.cartesian_prod(*map(torch.arange, kinds.shape[:3])).tolist():
            row = kinds[entry, head, i].tolist()
            shown = [(j, int(row[j] == 2)) for j in reversed(range(keys)) if row[j]]
            for parts in (1, 2):
                places = [
                    (j * parts + part, full) for j, full in shown for part in range(parts)[::-1]
                ]
                assert next(lines) == [n for place in places for n in place]
        for entry in range(batch):
            for kv_head in range(heads // group):
                for j in range(keys):
                    expected = []
                    for head in range(kv_head * group, (kv_head + 1) * group):
                        of_head = kinds[entry, head]
                        for block in reversed(range(m_blocks)):
                            kind = int(of_head[block // 2, j])
                            if kind:
                                turn = int((of_head[block // 2, :j] > 0).sum())
                                index = (entry * heads + head) * m_blocks + block
                                expected.append([head, block, int(kind == 2), turn, index])
                    by_warp = [[*step[:3], -1, step[4]] for step in expected]
                    for _ in range(3):
                        assert next(lines) == [n for step in expected for n in step]
                        assert next(lines) == [n for step in by_warp for n in step]
        assert next(lines, None) is None
