"""Which keys consumers of attention to a cache take to be seen, by blocks or slices of these, and
which of their scores they hide (attention/decode/seen_keys.hpp), compiled for the host: every
thread's columns beside what windows, chunks and trees say. Nothing here needs a GPU."""

import random

import pytest
from host_program import CHECKED, ROOT, host_program, needs_cxx

pytestmark = needs_cxx

NONE = -1  # a limit of the window without a value
FAULTS = {
    "": ("", ""),
    "a half of a block": ("new_keys_seen(row, first + half)", "new_keys_seen(row, first)"),
    "an end": ("seen.end - key)", "seen.end - key + 1)"),
    "a begin": (
        "(by_all.begin - tile.keys.begin + kTileN - 1)",
        "(by_all.begin - tile.keys.begin)",
    ),
    "the tree's first key": ("min(by_all.end, first_new())", "by_all.end"),
    "keys before a tree": ("bits << -first | ((uint64_t{1} << -first) - 1)", "bits << -first"),
}
STAND_INS = {
    "cute/tensor.hpp": """#pragma once
#include <type_traits>
namespace cute {
template <int kMode, class Fragment>
constexpr std::integral_constant<int, kMode == 0 ? Fragment::kRows : Fragment::kColumns> size(
    Fragment const&) {
  return {};
}
template <class Fragment>
constexpr int size(Fragment const&) {
  return Fragment::kRows * Fragment::kColumns;
}
}  // namespace cute
""",
    "cutlass/fast_math.h": """#pragma once
#include <cutlass/cutlass.h>
inline struct { uint32_t x; } threadIdx;
inline float __fdividef(float a, float b) { return a / b; }
namespace cutlass {
constexpr int NumThreadsPerWarpGroup = 128;
struct FastDivmod {
  int divisor;
  int div(int dividend) const { return dividend / divisor; }
};
namespace arch {
inline void fence_view_async_shared() {}
}
}  // namespace cutlass
""",
    "cute_kernels/sm90/named_barrier.hpp": """#pragma once
namespace cute_kernels::sm90 {
enum class NamedBarrier { kValuesCleared };
inline bool barrier_all(NamedBarrier, int, int, bool own) { return own; }
inline void barrier_sync(NamedBarrier, int, int) {}
}
""",
    "cute_kernels/sm90/opaque.hpp": """#pragma once
namespace cute_kernels::sm90 { inline int opaque(int value) { return value; } }
""",
}
MAIN = """
#include <iostream>
#include <vector>
#include "cute_kernels/attention/decode/seen_keys.hpp"
using namespace cute_kernels::attention;

template <int kTileN_>
struct Tiling {
  using Element = uint16_t;
  static constexpr int kTileRows = 128, kTileN = kTileN_, kConsumers = 2, kHeads = 1;
  static constexpr int kWarpgroupM = 64;
};
template <int kTileN>
struct Scores {
  static constexpr int kRows = 2, kColumns = kTileN / 4;
  float value[kRows][kColumns] = {};
  float& operator()(int row, int col) { return value[row][col]; }
};

// What the documentation says.
bool sees(CachedCall const& call, int query, int key) {
  int const queries = call.lengths.cu_seqlens_q[1], keys = call.lengths.used[0];
  int const first = call.lengths.leftpad[0], position = query + keys - queries;
  auto chunk = [&](int x) {
    int const of = x - first;
    return (of - (of % call.chunk + call.chunk) % call.chunk) / call.chunk;
  };
  if (key < first || key >= keys) return false;
  if (call.mask.left && key < position - *call.mask.left) return false;
  if (call.mask.right && key > position + *call.mask.right) return false;
  if (call.chunk > 0 && chunk(key) != chunk(position)) return false;
  int const number = key - (keys - queries);
  if (call.tree_mask == nullptr || number < 0) return true;
  return number < 64 && (call.tree_mask[query] >> number & 1) != 0;
}

// By slices of kKeys of a block's keys.
template <int kTileN, int kKeys = kTileN>
int wrong(CachedCall const& call) {
  using Traits = Tiling<kTileN>;
  CachedSequence const sequence = cached_sequence(call, 0);
  SequenceWork const work = work_of<Traits>(call, 0);
  WorkLine const line(work.blocks, 1, work.longest, 1, 1, 0, 0);
  WorkPlace const place = place_in_sequence<Traits>(sequence, 0, 0, 0, 0);
  cutlass::FastDivmod const group{call.group};
  int wrong = 0;
  for (WorkWalk<Traits> walk(call, line, place, 0); walk.valid(); walk.advance()) {
    int const rows = walk.tile().rows;
    for (int warpgroup = 0; warpgroup < (rows > 64 ? 2 : 1); ++warpgroup) {
      for (uint32_t thread = 0; thread < 128; ++thread) {
        threadIdx.x = 128 * (1 + warpgroup) + thread;
        int const first_row = 64 * warpgroup + first_accumulator_row();
        SeenKeys<Traits, kKeys> const seen(call, group, walk, first_row);
        constexpr int kSlices = kTileN / kKeys;
        int const end = walk.end_block() * kSlices;
        for (int block = walk.begin_block() * kSlices; block < end; ++block) {
          Scores<kKeys> by_bits, plain;
          seen.mask_by_bits(by_bits, block);
          if constexpr (kKeys <= 64) seen.mask(plain, block);
          for (int i = 0; i < 2; ++i) {
            int const row = walk.tile().first_row + first_row + 8 * i;
            if (first_row + 8 * i >= rows) continue;
            for (int col = 0; col < kKeys / 4; ++col) {
              int const column = first_accumulator_column() + accumulator_column(col);
              int const key = seen.first_key(block) + column;
              bool const right = sees(call, row / call.group, key);
              wrong += (by_bits(i, col) == 0.f) != right;
              if (kKeys <= 64) wrong += (plain(i, col) == 0.f) != right;
              wrong += seen.is_seen(i, key) != right;
              // Values behind the last key are 0.
              wrong += seen.are_alike(block) && !right && key < walk.tile().keys.end;
            }
          }
        }
      }
    }
  }
  return wrong;
}

int main() {
  auto limit = [](int value) { return value == -1 ? std::nullopt : std::optional<int>(value); };
  CachedCall call{};
  int left, right, has_tree;
  while (std::cin >> call.total_q >> call.group >> call.most_keys >> left >> right >> call.chunk >>
         has_tree) {
    call.batch = call.heads_kv = 1;
    call.heads_q = call.group;
    call.mask = {std::nullopt, limit(left), limit(right)};
    int const starts[] = {0, call.total_q};
    int leftpad;
    std::cin >> leftpad;
    call.lengths = {starts, &call.most_keys, &leftpad};
    std::vector<int64_t> tree(call.total_q);
    for (int64_t& bits : tree) std::cin >> bits;
    call.tree_mask = has_tree ? tree.data() : nullptr;
    std::cout << wrong<32>(call) << ' ' << wrong<64>(call) << ' ' << wrong<96>(call) << ' '
              << wrong<128>(call) << ' ' << wrong<64, 8>(call) << ' ' << wrong<128, 32>(call)
              << std::endl;
  }
}
"""


def cases(seed, count):
    chance = random.Random(seed)
    for _ in range(count):
        queries = chance.choice([1, 2, 7, 16, 33, 64, 70])
        keys = chance.choice([0, 1, 3, 63, 64, 65, 127, 128, 129, 190, 300, queries])
        tree = chance.random() < 0.5
        yield [
            *(queries, chance.choice([1, 3, 8]), keys),
            chance.choice([NONE, NONE, 0, 31, 100, 128]),
            chance.choice([NONE, 0, 0, 5]),
            chance.choice([0, 0, 0, 48, 128]),
            *(int(tree), chance.choice([0, 0, 1, 40])),
            *(
                chance.choice([-1, 0, chance.getrandbits(63), ~chance.getrandbits(63)])
                for _ in range(queries)
            ),
        ]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    def build(fault=""):
        folder = tmp_path_factory.mktemp("seen_keys")
        headers = ROOT / "cute_kernels" / "attention" / "decode"
        text = (headers / "seen_keys.hpp").read_text()
        right, planted = FAULTS[fault]
        assert right in text
        changed = {"cute_kernels/attention/decode/seen_keys.hpp": text.replace(right, planted)}
        for name, content in {**STAND_INS, **changed}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        options = ("-O1", *CHECKED, "-Wno-unknown-pragmas", "-Wno-unused-parameter")
        return host_program(folder, MAIN, *options, "-I", folder, "-I", ROOT / "tests/host_headers")

    return build


def test_every_score_is_hidden_or_shown_as_it_should_be(program):
    of_all = list(cases(0, 400))
    for case, wrong in zip(of_all, program()(of_all), strict=True):
        assert wrong == [0] * 6, case


@pytest.mark.parametrize("fault", [x for x in FAULTS if x])
def test_faults_are_found(program, fault):
    assert any(sum(wrong) > 0 for wrong in program(fault)(list(cases(1, 60))))
