"""Backward: dQ of the next group of heads is cleared beside the work on a group
(attention/backward/clear.hpp). CTAs and their warps at random speed, in memory full of NaN: nobody
may add to what is not cleared, nobody may wait forever. Nothing here needs a GPU."""

import random
from pathlib import Path

import pytest
from host_program import CHECKED, host_program, needs_cxx

pytestmark = needs_cxx

RIGHT, HANGS, WRONG = range(3)
AS_IT_IS, NOBODY_WAITS, COUNTS_THE_NEXT_GROUP, NO_STEPS_NO_ZEROS, NUMBERS_OF_CTAS = range(5)
MAIN = """
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <memory>
#include <random>
#include <vector>
#include "cutlass/cutlass.h"
namespace cutlass {
inline constexpr int NumThreadsPerWarp = 32;
}
inline struct { int x = 0; } threadIdx;
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline void __threadfence() {}
inline void __syncwarp() {}
#include "cute_kernels/attention/backward/clear.hpp"
using namespace cute_kernels;
using namespace cute_kernels::attention;

enum Error { kNone, kNobodyWaits, kCountsTheNextGroup, kNoStepsNoZeros, kNumbersOfCtas };

struct KeyBlock {
  int n_block, kv_head, batch;
  int batch_entry() const { return batch; }
};
struct Traits {
  using KeyBlock = ::KeyBlock;
  static constexpr int kTileM = 2, kHeadDim = 80;  // 40 vectors: lanes write one or two
};
struct Divisor {
  int divisor;
};
struct Params {
  Divisor heads_kv;
  int group, pairs, clusters, heads_per_kv;
  bool clears_ahead;
  struct {
    Divisor m_blocks;
    float* dq;
    int* cleared;
  } workspace;
};

constexpr int kFloats = Traits::kTileM * Traits::kHeadDim;
constexpr int kSenders = 2;

// The query blocks that see a key block: of some none.
bool sees(int n_block, int m_block) { return n_block % 3 != 1 && (n_block + m_block) % 4 != 0; }
std::vector<int> steps_of(Params const& params, KeyBlock const& coord) {
  std::vector<int> steps;
  for (int head = 0; head < params.heads_per_kv; ++head) {
    int const row = (coord.batch * params.heads_kv.divisor + coord.kv_head) * params.heads_per_kv;
    for (int block = params.workspace.m_blocks.divisor - 1; block >= 0; --block) {
      if (sees(coord.n_block, block)) {
        steps.push_back((row + head) * params.workspace.m_blocks.divisor + block);
      }
    }
  }
  return steps;
}

// key_block_of() of backward/key_blocks.hpp.
KeyBlock key_block_of(Params const& params, int number) {
  int const first_pair = number / (params.clusters * params.group) * params.group;
  int const in_group = number - first_pair * params.clusters;
  int const group = std::min(params.group, params.pairs - first_pair);
  int const pair = first_pair + in_group % group;
  return {in_group / group, pair % params.heads_kv.divisor, pair / params.heads_kv.divisor};
}

struct Simulation {
  Params params;
  Error error;
  int ctas;
  int drawn = 0;

  int numbers() const { return params.clusters * params.pairs; }

  // A CTA's loader, then for each warpgroup that computes it and its sender, then who clears. Each
  // but the loader reads numbers one after the other.
  struct Cta {
    int index;
    std::vector<int> handed;  // numbers, all of them
    int next = -1;            // drawn, not yet handed out
    bool loads_end = false;
    struct Reader {
      int read = 0;         // numbers
      int step = -1;        // of its key block, -1: it is done with it
      bool waited = false;  // until dQ is cleared
      bool ended = false;
    };
    std::array<Reader, 2 * kSenders + 1> readers;
    std::array<int, kSenders> slices{};  // handed out by a warpgroup, not yet added
    int done = 0;  // numbers that all have read
    bool ended() const {
      for (Reader const& reader : readers) {
        if (!reader.ended) return false;
      }
      return loads_end;
    }
  };

  bool load(Cta& cta) {
    if (cta.loads_end) return false;
    if (cta.next < 0) {
      int const rounds = static_cast<int>(cta.handed.size());
      cta.next = error == kNumbersOfCtas ? cta.index + rounds * ctas : drawn++;
      return true;
    }
    for (auto const& reader : cta.readers) {  // number_empty
      if (reader.read != static_cast<int>(cta.handed.size())) return false;
    }
    cta.handed.push_back(cta.next);
    cta.loads_end = cta.next >= numbers();
    cta.next = -1;
    return true;
  }

  /// Whether the reader has a key block; if not, it looks for the next one.
  bool begin(Cta& cta, Cta::Reader& reader, bool& moved) {
    if (reader.step >= 0) return true;
    if (reader.ended || reader.read == static_cast<int>(cta.handed.size())) return false;
    reader.ended = cta.handed[reader.read++] >= numbers();
    reader.step = reader.ended ? -1 : 0;
    reader.waited = false;
    moved = true;
    return false;
  }

  bool compute(Cta& cta, int warpgroup) {
    auto& reader = cta.readers[warpgroup];
    bool moved = false;
    if (!begin(cta, reader, moved)) return moved;
    if (cta.slices[warpgroup] > 0) return false;  // dq_empty
    auto const steps = steps_of(params, key_block_of(params, cta.handed[reader.read - 1]));
    if (reader.step == static_cast<int>(steps.size())) {
      reader.step = -1;
      return true;
    }
    ++cta.slices[warpgroup];
    ++reader.step;
    return true;
  }

  bool send(Cta& cta, int warpgroup) {
    auto& reader = cta.readers[kSenders + warpgroup];
    bool moved = false;
    if (!begin(cta, reader, moved)) return moved;
    KeyBlock const coord = key_block_of(params, cta.handed[reader.read - 1]);
    if (!reader.waited && error != kNobodyWaits) {
      try {
        Params counts = params;
        if (error == kCountsTheNextGroup) {
          int const first = group_of_heads(params, coord) * params.group;
          counts.clusters = 1;
          counts.group = params.clusters * std::min(params.group, params.pairs - first);
          int const group = first / params.group;
          if (group > 0) sm90::semaphore_wait(params.workspace.cleared + group, counts.group);
        } else {
          wait_until_cleared(params, coord);
        }
      } catch (sm90::MustWait const&) {
        return false;
      }
    }
    reader.waited = true;
    auto const steps = steps_of(params, coord);
    if (reader.step == static_cast<int>(steps.size())) {
      reader.step = -1;
      return true;
    }
    if (cta.slices[warpgroup] == 0) return false;
    constexpr int kSlice = kFloats / kSenders;
    float* const to = params.workspace.dq + steps[reader.step] * kFloats + warpgroup * kSlice;
    for (int i = 0; i < kSlice; ++i) to[i] += 1.f;
    --cta.slices[warpgroup];
    ++reader.step;
    return true;
  }

  bool clear(Cta& cta) {
    auto& reader = cta.readers[2 * kSenders];
    bool moved = false;
    if (!begin(cta, reader, moved)) return moved;
    KeyBlock const coord = key_block_of(params, cta.handed[reader.read - 1]);
    if (error != kNoStepsNoZeros || !steps_of(params, coord).empty()) {
      for (threadIdx.x = 31; threadIdx.x >= 0; --threadIdx.x) {  // the last to come counts
        clear_next_group<Traits>(params, coord);
      }
    }
    reader.step = -1;
    return true;
  }

  bool move(Cta& cta, int role) {
    if (role == 0) return load(cta);
    if (role <= kSenders) return compute(cta, role - 1);
    if (role <= 2 * kSenders) return send(cta, role - 1 - kSenders);
    return clear(cta);
  }

  /// Whether all CTAs have ended, of which `resident` run at a time.
  bool run(int resident, std::mt19937& random) {
    constexpr int kRoles = 2 * kSenders + 2;
    std::vector<std::unique_ptr<Cta>> running;
    int started = 0;
    std::vector<int> slow(kRoles);  // roles that seldom move
    for (int& each : slow) each = random() % 3 == 0 ? 20 : 1;
    while (true) {
      auto const ended = [](auto const& cta) { return cta->ended(); };
      running.erase(std::remove_if(running.begin(), running.end(), ended), running.end());
      while (started < ctas && static_cast<int>(running.size()) < resident) {
        running.push_back(std::make_unique<Cta>());
        running.back()->index = started++;
      }
      if (running.empty()) return true;
      bool moved = false;
      for (int i = 0; i < 50 && !moved; ++i) {
        int const role = random() % kRoles;
        if (random() % slow[role] == 0) moved = move(*running[random() % running.size()], role);
      }
      for (size_t i = 0; i < running.size() && !moved; ++i) {
        for (int role = 0; role < kRoles && !moved; ++role) moved = move(*running[i], role);
      }
      if (!moved) {
        bool any = false;
        for (auto const& cta : running) any |= cta->ended();
        if (!any) return false;
      }
    }
  }
};

int answer(Params params, Error error, int ctas, int resident, int seed) {
  int const m_blocks = params.workspace.m_blocks.divisor, rows = params.pairs * params.heads_per_kv;
  std::vector<float4> memory(static_cast<size_t>(rows) * m_blocks * kFloats / 4, [] {
    float const nan = NAN;
    return float4{nan, nan, nan, nan};
  }());
  std::vector<int> cleared(rows, 0);
  params.workspace.dq = reinterpret_cast<float*>(memory.data());
  params.workspace.cleared = cleared.data();
  params.clears_ahead = params.group < params.pairs;
  int const rows_to_clear = params.clears_ahead ? params.group * params.heads_per_kv : rows;
  for (int i = 0; i < rows_to_clear * m_blocks * kFloats; ++i) params.workspace.dq[i] = 0.f;
  std::mt19937 random(seed);
  Simulation simulation{params, error, ctas};
  if (!simulation.run(resident, random)) return 1;
  for (int row = 0; row < rows; ++row) {
    for (int block = 0; block < m_blocks; ++block) {
      float expected = 0.f;
      for (int n = 0; n < params.clusters; ++n) expected += sees(n, block);
      for (int i = 0; i < kFloats; ++i) {
        if (params.workspace.dq[(row * m_blocks + block) * kFloats + i] != expected) return 2;
      }
    }
  }
  return 0;
}

int main() {
  Params params{};
  int batch, error, ctas, resident, seed;
  while (std::cin >> batch >> params.heads_kv.divisor >> params.heads_per_kv >> params.group >>
         params.clusters >> params.workspace.m_blocks.divisor >> error >> ctas >> resident >>
         seed) {
    params.pairs = batch * params.heads_kv.divisor;
    params.group = std::min(params.group, params.pairs);
    std::cout << answer(params, static_cast<Error>(error), ctas, resident, seed) << '\\n';
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    headers = str(Path(__file__).parent / "host_headers")
    folder = tmp_path_factory.mktemp("cleared_heads")
    options = ("-O1", "-Wno-unknown-pragmas", "-I", headers, *CHECKED)
    return host_program(folder, MAIN, *options)


def cases(error, number, rng):
    for seed in range(number):
        ctas = rng.randint(1, 12)
        yield (
            *(rng.randint(1, 3), rng.randint(1, 5), rng.randint(1, 3)),  # batch, heads
            rng.choice([1, 2, 4, 4]),  # heads at a time
            *(rng.randint(1, 5), rng.randint(1, 4)),  # blocks of keys and of queries
            *(error, ctas, rng.randint(1, ctas), seed),
        )


def test_nobody_adds_to_what_is_not_cleared_nor_waits_forever(program):
    answers = program(list(cases(AS_IT_IS, 2000, random.Random(0))))
    assert all(answer == [RIGHT] for answer in answers)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (NOBODY_WAITS, WRONG),
        (COUNTS_THE_NEXT_GROUP, HANGS),
        (NO_STEPS_NO_ZEROS, HANGS),
        (NUMBERS_OF_CTAS, HANGS),
    ],
)
def test_planted_errors_show(program, error, found):
    answers = program(list(cases(error, 500, random.Random(1))))
    assert [found] in answers
