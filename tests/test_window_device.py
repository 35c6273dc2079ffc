"""A kernel for short windows (attention/window) beside its pieces: on the host, with stand-ins for
CUDA, its mask and what it does about what is not finite, around products in plain C++. Nothing here
needs a GPU."""

import math
import random

import pytest
import torch
from host_program import needs_cxx
from oracle import visible
from test_device_logic import device_program

pytestmark = needs_cxx

CHANNELS = 16  # of V; a row has 64
TILES = [(64, 136), (256, 136), (192, 144)]  # tile_m, tile_n
MAIN = """
#include <iostream>
#include <vector>
#include "cute_kernels/attention/window/mask.hpp"
#include "cute_kernels/attention/window/value_guard.hpp"
#include "tests/host_lists.hpp"
using namespace cute_kernels;
using namespace cute_kernels::attention;
using Element = cutlass::bfloat16_t;

constexpr int kChannels = %d, kRowElements = 64, kWarpM = 16;

struct Tensors {
  std::vector<Element> v, out;  // (rows, heads, channels)
  std::vector<int> wild_keys;   // whether all of a row of K is NaN
};

struct Params {
  WindowKeys keys;
  int group_log2;
  int head_dim_v;
  TensorView v;
  TensorView out;
};

// The scores of a thread: two rows, of which it has two columns in eight.
template <int kColumns>
struct Scores {
  float (&of_warpgroup)[WindowKeys::kWarpgroupM][kColumns];
  int first_row, lane;
  float& operator()(int row, int column) {
    int const of_all = column / 2 * 8 + lane %% 4 * 2 + column %% 2;
    return of_warpgroup[first_row + lane / 4 + 8 * row][of_all];
  }
};

template <int kTileM, int kTileN>
class Kernel {
  static constexpr int kRows = WindowKeys::kWarpgroupM, kWarpgroups = kTileM / kRows;
  static constexpr int kValues = WindowKeys::values(kTileN);
  static constexpr int kTileKeys =
      WindowKeys{WindowKeys::kMostQueries, kTileN}.of_tile(kWarpgroups);
  using Builder = WorkListBuilder<RowTiling<kTileM>, GroupedCall>;

 public:
  Kernel(AttentionCall const& call, Tensors& tensors)
      : tensors_(tensors), call_(grouped_call(call)) {
    CallSizes const& sizes = call.sizes;
    auto view = [](std::vector<Element>& data, int heads) {
      return TensorView{data.data(), 0, int64_t{heads} * kChannels, kChannels};
    };
    params_ = {{kRows >> call_.group_log2, kTileN},
               call_.group_log2,
               kChannels,
               view(tensors.v, sizes.heads_kv),
               view(tensors.out, sizes.heads_q)};
  }

  void run() {
    HostWorkList<Builder> const listed(call_, call_.call.sizes.batch, most_tiles(call_, kTileM));
    WorkList const& list = listed.list;
    auto each_tile = [&](auto visit) {
      for (int i = 0; i < *list.count; ++i) {
        for (int head = 0; head < call_.call.sizes.heads_kv; ++head) visit(list.tiles[i], head);
      }
    };
    each_tile([&](WorkTile const& tile, int head) { compute(tile, head, false); });
    if (!wanted_) return;
    each_tile([&](WorkTile const& tile, int head) { compute(tile, head, true); });
    constexpr int kThreads = 128 * kWarpgroups;
    each_tile([&](WorkTile const& tile, int head) {
      for (int thread = 0; thread < kThreads; ++thread) {
        WindowValueGuard<Element>::restore(params_, tile, head, kTileM, thread, kThreads);
      }
    });
  }

 private:
  void compute(WorkTile const& tile, int head_kv, bool guarded) {
    // What lies behind what TMA brings is of tiles before.
    alignas(16) static Element values[kTileKeys * kRowElements];
    for (Element& value : values) value = Element::bitcast(0x7fc0);
    int const first_key = params_.keys.first(tile.first_row >> params_.group_log2, tile.right_edge);
    int const rows_k = static_cast<int>(tensors_.wild_keys.size());
    for (int key = 0; key < params_.keys.of_tile(kWarpgroups); ++key) {
      int const row = tile.sequence.row_k + first_key + key;
      for (int channel = 0; channel < kRowElements; ++channel) {
        bool const is_there = row >= 0 && row < rows_k && channel < kChannels;
        values[key * kRowElements + channel] =
            is_there ? rows_of<Element>(params_.v, 0, head_kv, row)[channel] : Element(0.f);
      }
    }
    if (guarded) {
      bool all = true;
      for (int lane = 0; lane < 32; ++lane) {
        all &= sm90::all_finite<32, kTileKeys * kRowElements>(values, lane);
      }
      for (int lane = 0; lane < 32 && !all; ++lane) {
        sm90::clear_nonfinite<32, kTileKeys * kRowElements>(values, lane);
      }
    }
    SeenTile const seen = seen_tile(tile, params_.group_log2, params_.keys, head_kv);
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
      int const shift = WindowKeys::shift(warpgroup * params_.keys.queries);
      int const row_k = tile.sequence.row_k + first_key + shift;  // of the block
      compute_block(seen, warpgroup * kRows, shift, row_k, values + shift * kRowElements);
    }
  }

  void compute_block(SeenTile const& tile, int first_row, int shift, int row_k,
                     Element const* values) {
    static float scores[kRows][kTileN];
    int const group = 1 << params_.group_log2;
    for (int row = 0; row < kRows; ++row) {
      int const query = tile.row + (first_row + row) / group, head = (first_row + row) %% group;
      for (int column = 0; column < kTileN; ++column) {
        int const key = row_k + column;
        bool const is_there = key >= 0 && key < static_cast<int>(tensors_.wild_keys.size());
        scores[row][column] = is_there && tensors_.wild_keys[key] ? NAN
                              : is_there ? static_cast<float>((7 * key + 3 * query + 5 * head) %% 4)
                                         : 0.f;
      }
    }
    for (int warp = 0; warp < kRows / kWarpM; ++warp) {
      for (int lane = 0; lane < 32; ++lane) {
        auto query = [&](int row) { return (first_row + warp * kWarpM + row) / group; };
        WindowBlockMask<kTileN> const mask(tile, shift, query(0), query(kWarpM - 1),
                                           query(lane / 4), query(lane / 4 + 8), lane);
        Scores<kTileN> of_thread{scores, warp * kWarpM, lane};
        mask.apply(of_thread);
      }
    }
    for (int row = 0; row < kRows; ++row) {
      int const query = (first_row + row) / group, head = (first_row + row) %% group;
      if (query >= tile.queries) continue;
      Element* const out =
          rows_of<Element>(params_.out, 0, tile.head_kv * group + head, tile.row + query);
      for (int channel = 0; channel < kChannels; ++channel) {
        float sum = 0.f, total = 0.f;
        for (int column = 0; column < kValues; ++column) {
          float const p = column < kTileN ? std::exp2(scores[row][column]) : 0.f;
          sum += p;
          total += p * static_cast<float>(values[column * kRowElements + channel]);
        }
        out[channel] = Element(total * (sum == 0.f ? 0.f : 1.f / sum));
        wanted_ |= !sm90::is_finite(out[channel]);
      }
    }
  }

  Tensors& tensors_;
  GroupedCall call_;
  Params params_;
  bool wanted_ = false;
};

int main() {
  int left, right, tile;
  AttentionCall call{};
  CallSizes& sizes = call.sizes;
  while (std::cin >> sizes.heads_q >> sizes.heads_kv >> left >> right >> tile) {
    call.mask = {std::nullopt, left, right};
    std::vector<int> const cu_q = read_numbers(), cu_k = read_numbers(), used_q = read_numbers(),
                           used_k = read_numbers();
    sizes.batch = static_cast<int>(cu_q.size()) - 1;
    call.packed.cu_seqlens_q = cu_q.data();
    call.packed.cu_seqlens_k = cu_k.data();
    call.packed.seqused_q = used_q.data();
    call.packed.seqused_k = used_k.data();
    call.packed.total_q = cu_q.back();
    call.packed.total_k = cu_k.back();
    Tensors tensors;
    tensors.wild_keys = read_numbers();
    for (int bits : read_numbers()) {
      tensors.v.push_back(Element::bitcast(static_cast<uint16_t>(bits)));
    }
    tensors.out.resize(int64_t{call.packed.total_q} * sizes.heads_q * kChannels);
    switch (tile) {
      %s
    }
    for (Element x : tensors.out) std::cout << x.bits << ' ';
    std::cout << '\\n';
  }
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Outputs (rows, heads, channels) of calls: group, key heads, window, number of the tile,
    lengths of the slots, what of them is used, rows of K that are NaN, V."""
    cases = " ".join(
        f"case {i}: Kernel<{m}, {n}>(call, tensors).run(); break;" for i, (m, n) in enumerate(TILES)
    )
    folder = tmp_path_factory.mktemp("window")
    program = device_program(folder, MAIN % (CHANNELS, cases), "-Wno-unknown-pragmas", "-O1")

    def run(group, heads_kv, window, tile, slots, used, wild_keys, v):
        words = [group * heads_kv, heads_kv, *window, tile]
        for lengths in (*map(starts, slots), *used, wild_keys.int().tolist()):
            words += [len(lengths), *lengths]
        bits = v.view(torch.int16).flatten().int() & 0xFFFF
        words += [len(bits), *bits.tolist()]
        (line,) = program([words])
        out = torch.tensor(line, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        return out.view(sum(slots[0]), group * heads_kv, CHANNELS)

    return run


def starts(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def random_call(chance):
    tile = chance.randrange(len(TILES))
    group = chance.choice([4, 8, 16, 32, 64])
    queries = 64 // group
    most = TILES[tile][1] - queries + 1 - max(0, 8 - queries)
    window = chance.choice([most, most, 1, chance.randint(2, most)])
    right = chance.choice([0, window - 1, chance.randrange(window)])
    length = lambda: chance.choice([0, 1, chance.randint(2, 40), chance.randint(40, 200)])  # noqa: E731
    slots = [[length() for _ in range(3)] for _ in range(2)]
    slots[1][1] = slots[0][1]
    used = [[chance.choice([n, n, chance.randint(0, n)]) for n in of] for of in slots]
    return group, chance.randint(1, 2), (window - 1 - right, right), tile, slots, used


@pytest.mark.parametrize("seed", range(16))
def test_what_is_not_finite_is_in_the_rows_that_see_it(kernel, seed):
    """In others the bits are those of 0 in its place, and what they should be."""
    chance = random.Random(seed)
    call = random_call(chance)
    group, heads_kv, window, _, slots, used = call
    rows = sum(slots[1])
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(rows, heads_kv, CHANNELS, generator=generator).bfloat16()
    dense = chance.random() < 0.3
    wild = torch.rand(clean.shape, generator=generator) < (0.5 if dense else 0.003)
    unused = torch.ones(rows, dtype=torch.bool)
    for first, count in zip(starts(slots[1]), used[1], strict=False):
        unused[first : first + count] = False
    wild[unused] = True
    clean[wild] = 0.0
    some = torch.tensor([math.nan, math.inf, -math.inf]).bfloat16()
    spoilt = clean.where(~wild, some[torch.randint(3, clean.shape, generator=generator)])
    wild_keys = unused | (torch.rand(rows, generator=generator) < 0.003)
    out, right = kernel(*call, wild_keys, spoilt), kernel(*call, wild_keys, clean)

    head = torch.arange(group)
    for i in range(len(used[0])):
        of_q = slice(starts(slots[0])[i], starts(slots[0])[i] + used[0][i])
        of_k = slice(starts(slots[1])[i], starts(slots[1])[i] + used[1][i])
        sees = visible(used[0][i], used[1][i], False, window)
        query, key = (torch.arange(x.start, x.stop) for x in (of_q, of_k))
        scores = 7 * key + 3 * query[:, None, None] + 5 * head[:, None]  # queries, heads, keys
        p = (scores % 4).double().exp2() * sees[:, None]
        p = (p / p.sum(-1, keepdim=True)).nan_to_num(0.0)
        exact = torch.einsum("qgk,khc->qhgc", p, clean[of_k].double()).flatten(1, 2)
        lost = (sees & wild_keys[of_k]).any(1)
        got, same = out[of_q], right[of_q]
        assert got[lost].isnan().all() and same[lost].isnan().all()
        torch.testing.assert_close(same[~lost].double(), exact[~lost], atol=0.02, rtol=0.01)
        added = [
            torch.einsum("qk,khc->qhc", sees.double(), (spoilt[of_k] == value).double()) > 0
            for value in (math.inf, -math.inf)
        ]
        added.append(torch.einsum("qk,khc->qhc", sees.double(), spoilt[of_k].isnan().double()) > 0)
        above, below, nan = (x.repeat_interleave(group, 1)[~lost] for x in added)
        got, same = got[~lost], same[~lost]
        shown = above | below | nan
        assert torch.equal(got.isnan(), nan | (above & below))
        assert torch.equal(got == math.inf, above & ~below & ~nan)
        assert torch.equal(got == -math.inf, below & ~above & ~nan)
        assert torch.equal(got.view(torch.int16)[~shown], same.view(torch.int16)[~shown])
