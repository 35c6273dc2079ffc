"""What kernels make of a block mask's lists (attention/forward/key_walk.hpp, backward/steps.hpp),
compiled for this machine: every listed block is walked once, in order. Nothing here needs a GPU."""

import random
from pathlib import Path

import pytest
import torch
from block_masks import random_kinds
from configure import ROOT
from host_program import CHECKED, host_program, needs_cxx

from cute_kernels.variants.block_mask import block_lists

pytestmark = needs_cxx

LANES = 4  # of a warp, fewer than there are so that lists are longer than it
# What the headers have of CUDA
STUB = """
#pragma once
#include_next <cutlass/cutlass.h>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <type_traits>
namespace cutlass { constexpr int NumThreadsPerWarp = %(lanes)d; }
inline thread_local struct { int x = 0; } threadIdx;

// A warp's lanes are threads here, which wait for each other.
class Warp {
 public:
  int exchange(int value, int lane) {
    values_[threadIdx.x] = value;
    meet();
    int const result = values_[lane];
    meet();
    return result;
  }

 private:
  void meet() {
    std::unique_lock lock(mutex_);
    int const round = round_;
    if (++arrived_ == cutlass::NumThreadsPerWarp) {
      arrived_ = 0;
      ++round_;
      all_there_.notify_all();
    }
    all_there_.wait(lock, [&] { return round_ != round; });
  }

  std::mutex mutex_;
  std::condition_variable all_there_;
  int arrived_ = 0, round_ = 0, values_[cutlass::NumThreadsPerWarp];
};
inline Warp warp;
inline int __shfl_sync(unsigned, int value, int lane) { return warp.exchange(value, lane); }
"""
STEPS = "cute_kernels/attention/backward/steps.hpp"
MAIN = """
#include <iostream>
#include <sstream>
#include <thread>
#include <vector>
#include <cutlass/cutlass.h>
#include "cute_kernels/attention/forward/key_walk.hpp"
#include "cute_kernels/attention/variant/shared_mask.hpp"
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
  struct Variant {
    static constexpr bool kHasBlockMask = true, kHides = true;
    struct Hooks { static constexpr bool kMaskAsksHead = false, kMaskAsksBatch = false; };
  };
  using KeyBlock = ::KeyBlock;
  static constexpr bool kAnyCall = true;
  static constexpr int kTileM = 64, kTileN = kTileN_, kCluster = kMaskUnit / kTileN;
};
struct Params {
  int heads, heads_per_kv;
  struct { struct { int divisor; } m_blocks; } workspace;
  struct { BlockLists blocks; uint32_t const* shared_mask; } variant;
};

// As kernels ask, who begin with whether there is a step.
template <int kTileN, Caller kCaller>
auto first_step(Params const& params, KeyBlock const& keys) {
  KeyBlockSteps<Traits<kTileN>, Params, kCaller> const steps(params, keys);
  bool const any = steps.any();
  auto const first = steps.first();
  if (any != first.valid()) throw any;
  return first;
}

template <int kTileN>
void print_steps(Params const& params, KeyBlock const& keys) {
  auto print = [](std::ostream& to, auto step, auto const& turn_of) {
    for (; step.valid(); step.advance()) {
      for (int64_t value : {int64_t{step.head()}, int64_t{step.block()}, int64_t{step.masked()},
                            int64_t{step.is_full()}, int64_t{step.hides_some()},
                            int64_t{turn_of(step)}, step.block_index()}) {
        to << value << ' ';
      }
    }
    to << '\\n';
  };
  print(std::cout, first_step<kTileN, Caller::kThread>(params, keys),
        [](auto const& step) { return step.turn(); });
  std::ostringstream of_lanes[cutlass::NumThreadsPerWarp];
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < cutlass::NumThreadsPerWarp; ++lane) {
    lanes.emplace_back([&, lane] {
      threadIdx.x = lane;
      print(of_lanes[lane], first_step<kTileN, Caller::kWarp>(params, keys),
            [&](auto const& step) {  // where its words are
              uint32_t const* const words = step.shared_words(0);
              return words == nullptr ? -1 : words - params.variant.shared_mask;
            });
    });
  }
  for (std::thread& lane : lanes) lane.join();
  for (auto const& lane : of_lanes) std::cout << lane.str();
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
  int batch, heads, group, batches, of_heads, queries, keys, m_blocks, full_begin, full_end;
  while (std::cin >> batch >> heads >> group >> batches >> of_heads >> queries >> keys >>
         m_blocks >> full_begin >> full_end) {
    BlockRange const seen{0, m_blocks, full_begin, full_end};
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
    std::vector<uint32_t> const words(batches * of_heads * keys * SharedMask<64>::kWordsOfRow);
    uint32_t const* const shared_mask = of_heads == 1 ? words.data() : nullptr;
    Params const params{heads, group, {{m_blocks}}, {backward, shared_mask}};
    for (int entry = 0; entry < batch; ++entry) {
      for (int kv_head = 0; kv_head < heads / group; ++kv_head) {
        for (int unit = 0; unit < keys; ++unit) {
          print_steps<128>(params, {unit, kv_head, seen, {entry}});
          print_steps<64>(params, {2 * unit, kv_head, seen, {entry}});
          print_steps<64>(params, {2 * unit + 1, kv_head, seen, {entry}});
        }
      }
    }
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    headers = str(Path(__file__).parent / "host_headers")
    folder = tmp_path_factory.mktemp("walk")
    (folder / "cutlass").mkdir()
    (folder / "cutlass" / "cutlass.h").write_text(STUB % {"lanes": LANES})
    lines = (ROOT / STEPS).read_text().splitlines()
    without_includes = [line for line in lines if not line.startswith("#include")]
    (folder / "steps.hpp").write_text("\n".join(without_includes))
    return host_program(folder, MAIN, "-I", folder, "-I", headers, "-pthread", *CHECKED)


def words_of(row, shown, block, shares):
    """Where the first thread's word of a block of 64 queries is: of a list, a unit of keys, the
    first 8 and the last 8 units that it shows have places."""
    place, count = int(shown[: block // 2].sum()), int(shown.sum())
    slot = place if place < 8 else 16 - (count - place)
    if not shares or slot < 8 <= place:
        return -1
    return ((row * 16 + slot) * 2 + block % 2) * 256


def test_every_listed_block_is_walked_once(program):
    for seed in range(40):
        chance = random.Random(seed)
        batch, group = chance.choice([1, 2]), chance.choice([1, 2, 3])
        heads, queries, keys = group * chance.choice([1, 2]), chance.choice([1, 5, 9, 20]), 4
        shape = (chance.choice([1, batch]), chance.choice([1, heads]), queries, keys)
        kinds = random_kinds(shape, seed)
        beyond = chance.choice([0, 1, 2, 3])  # the last block of the mask may, which has some units
        if beyond > 1:
            kinds[:, :, -2:] = kinds[:, :, -1:]
        m_blocks = max(1, 2 * queries - beyond)
        lists = [n for x in block_lists(kinds) for n in x.flatten().tolist()]
        full = range(chance.randrange(3), m_blocks + 1 - chance.randrange(3))  # to the call's mask
        case = [batch, heads, group, *shape, m_blocks, full.start, full.stop, *lists]
        lines = iter(program([case]))
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
                                masked, is_full = block not in full, kind == 2
                                hides = masked or not is_full
                                expected.append([head, block, masked, is_full, hides, turn, index])
                    rows = [kinds[entry, head, :, j] > 0 for head in range(heads)]
                    row = (entry if shape[0] > 1 else 0) * keys + j
                    words = [words_of(row, rows[s[0]], s[1], shape[1] == 1) for s in expected]
                    by_lane = [
                        [*step[:5], at, step[6]] for step, at in zip(expected, words, strict=True)
                    ]
                    for _ in range(3):
                        assert next(lines) == [n for step in expected for n in step]
                        for _ in range(LANES):
                            assert next(lines) == [n for step in by_lane for n in step]
        assert next(lines, None) is None
