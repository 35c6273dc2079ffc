"""What a mask hook is asked once for all heads (attention/variant/shared_mask.hpp), by functions of
kernels: each bit beside the hook and the call's own mask. Nothing here needs a GPU."""

import random
from pathlib import Path

import pytest
import torch
from host_program import CHECKED, host_program, needs_cxx

from cute_kernels.compile.hooks import Hooks, Tensor, hooks_source
from cute_kernels.variants.block_mask import HIDDEN, block_lists

pytestmark = needs_cxx

UNIT = 128
END = 8  # entries at each end of a list whose bits there are
SAME = Hooks(
    name="same",
    score=None,
    mask="return of_query[batch][query] == of_key[batch][key];",
    weight=None,
    score_gradient=None,
    tensors=(
        Tensor("of_query", "int32", ("batch", "query")),
        Tensor("of_key", "int32", ("batch", "key")),
    ),
    numbers=(),
    block_mask=True,
)
MAIN = """
#include <iostream>
#include <vector>
#include "cutlass/cutlass.h"
inline struct { int x = 0; } threadIdx;
#include "cute_kernels/attention/variant/captured.hpp"
#include "cute_kernels/attention/variant/math.hpp"
#include "cute_kernels/attention/variant/shared_mask.hpp"
using namespace cute_kernels::attention;
using namespace hook_math;

%s
using Variant = HookedVariant<Hooks>;

// How many blocks have bits, how many of them are wrong, how many words are written beside them.
template <int kTileN, MaskRows kRows>
void check(AttentionCall const& call, VariantArguments variant) {
  constexpr bool kByKeys = kRows == MaskRows::kKeys;
  using Bits = SharedMask<kTileN>;
  BlockLists const& lists = variant.blocks;
  int64_t const rows = rows_of_shared_mask<Variant, kTileN, kRows>(call, lists);
  constexpr uint32_t kNoBits = 0xdeadbeef;  // which no thread here has, to be seen
  std::vector<uint32_t> words(rows * Bits::kWordsOfRow, kNoBits);
  int const units = mask_units<kRows>(call.sizes);
  AskMask<Variant, kTileN, kRows> const ask(call, variant, words.data());
  for (int cta = 0; rows > 0 && cta < ask.ctas(); ++cta) {
    for (threadIdx.x = 0; threadIdx.x < Bits::kThreads; ++threadIdx.x) {
      ask(cta, ask.ctas(), Bits::kThreads);
    }
  }
  int64_t blocks = 0, wrong = 0, beside = 0, unknown = 0;
  for (int batch = 0; rows > 0 && batch < call.sizes.batch; ++batch) {
    Sequence const sequence = sequence_of(call, batch);
    WindowRanges const mask = ranges_of(call, sequence, batch);
    SequencePlace const places(variant, batch, 0, sequence);
    for (int unit = 0; unit < units; ++unit) {
      BlockRow const list(lists, batch, 0, unit);
      for (int i = 0; i < list.count(); ++i) {
        BlockEntry const entry = list.entry(i);
        int const slot = Bits::slot_of(i, list.count());
        unknown += slot < 0;
        for (int block = 0; slot >= 0 && block < Bits::kBlocksOfUnit; ++block) {
          blocks += !entry.is_full();
          for (int thread = 0; thread < Bits::kThreads; ++thread) {
            uint32_t* const from = &words.at(Bits::place(list.number(), slot, block, thread));
            uint32_t known[Bits::kWords];
            KnownMask<kTileN>{from}(known);
            if (entry.is_full()) {
              beside += known[0] != kNoBits;
              continue;
            }
            int const row = unit * kMaskUnit + thread / 32 * 16 + thread %% 32 / 4;
            int const column = entry.unit() * kMaskUnit + block * kTileN + thread %% 4 * 2;
            for (int bit = 0; bit < 2 * Bits::kColumns; ++bit) {
              int const col = bit %% Bits::kColumns, own = row + 8 * (bit / Bits::kColumns);
              int const at = column + col / 2 * 8 + col %% 2;
              bool const seen = kByKeys || (at >= mask.first_key(own) && at < mask.end_key(own));
              bool const shown = Hooks::mask(kByKeys ? places.template at<Variant>(at, own)
                                                     : places.template at<Variant>(own, at),
                                             variant);
              wrong += (known[bit / 32] >> bit %% 32 & 1) != (seen && shown);
            }
          }
        }
      }
    }
  }
  std::cout << rows << ' ' << blocks << ' ' << wrong << ' ' << beside << ' ' << unknown << '\\n';
}

int main() {
  AttentionCall call{};
  CallSizes& sizes = call.sizes;
  VariantArguments variant{};
  // Kernels that share nothing have tiles that are no part of a unit.
  if (bytes_of_shared_mask<NoVariant, 96>(call, nullptr) != 0) return 1;
  // Nor is there anything to ask about where there are no rows, whatever lists say.
  int const listed = 1;
  sizes = {2, 128, 0, 4, 4, 64, 64};
  BlockLists const beyond{&listed, &listed, &listed, 3, 0, 1};
  if (rows_of_shared_mask<Variant, 64, MaskRows::kKeys>(call, beyond) != 0) return 2;
  int left, right, rows_of_batch, count, capacity;
  while (std::cin >> sizes.batch >> sizes.heads_q >> sizes.seqlen_q >> sizes.seqlen_k >> left >>
         right >> rows_of_batch >> variant.blocks.rows_of_head >> count >> capacity) {
    auto read = [](int64_t size) {
      std::vector<int> values(size);
      for (int& value : values) std::cin >> value;
      return values;
    };
    auto const counts = read(count), entries = read(int64_t{count} * capacity),
               of_query = read(int64_t{sizes.batch} * sizes.seqlen_q),
               of_key = read(int64_t{sizes.batch} * sizes.seqlen_k);
    call.mask = {};
    if (left >= 0) call.mask.left = left;
    if (right >= 0) call.mask.right = right;
    variant.most_queries = sizes.seqlen_q;
    variant.most_keys = sizes.seqlen_k;
    variant.tensors[0] = {of_query.data(), {sizes.seqlen_q, 1}, {sizes.batch, sizes.seqlen_q}};
    variant.tensors[1] = {of_key.data(), {sizes.seqlen_k, 1}, {sizes.batch, sizes.seqlen_k}};
    variant.blocks.counts = counts.data();
    variant.blocks.entries = entries.data();
    variant.blocks.rows_of_batch = rows_of_batch;
    variant.blocks.capacity = capacity;
    check<128, MaskRows::kQueries>(call, variant);
    check<64, MaskRows::kQueries>(call, variant);
    // Backward's lists are of units of keys, and the call's own mask is applied apart.
    std::swap(sizes.seqlen_q, sizes.seqlen_k);
    std::swap(variant.most_queries, variant.most_keys);
    std::swap(variant.tensors[0], variant.tensors[1]);
    check<128, MaskRows::kKeys>(call, variant);
    check<64, MaskRows::kKeys>(call, variant);
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    headers = str(Path(__file__).parent / "host_headers")
    folder = tmp_path_factory.mktemp("shared_mask")
    return host_program(folder, MAIN % hooks_source(SAME, ()), "-O1", "-I", headers, *CHECKED)


def case(rng, batch, heads, *, batches=None, of_heads=1, beyond=0, seqlen=None):
    """A call's numbers, its kinds of units, and the units of its queries. Lists may be for units
    `beyond` the last query and key, as those of a mask of larger blocks."""
    units_q, units_k = rng.randint(1, 3), rng.choice([1, 3, 20])
    seqlen_q, seqlen_k = (n * UNIT - rng.randrange(UNIT) for n in (units_q, units_k))
    if seqlen:
        seqlen_q, seqlen_k, units_q, units_k = seqlen, seqlen, 1, 1
    own_units, units_q, units_k = units_q, units_q + beyond, units_k + beyond
    kinds = torch.randint(0, 3, (batches or batch, of_heads, units_q, units_k))
    lists = block_lists(kinds.to(torch.int8))
    left, right = rng.choice([(-1, -1), (-1, 0), (rng.randrange(400), rng.randrange(50))])
    rows_of_batch = 0 if kinds.shape[0] == 1 else of_heads * units_q
    rows_of_head = 0 if of_heads == 1 else units_q
    ids = [torch.randint(0, 3, (batch, n)).flatten().tolist() for n in (seqlen_q, seqlen_k)]
    numbers = [
        *(batch, heads, seqlen_q, seqlen_k, left, right, rows_of_batch, rows_of_head),
        *(lists.key_counts.numel(), units_k),
        *lists.key_counts.flatten().tolist(),
        *lists.keys.flatten().tolist(),
        *(x for values in ids for x in values),
    ]
    return numbers, kinds, own_units


def test_every_bit_is_what_the_hook_and_the_mask_say(program):
    rng = random.Random(0)
    torch.manual_seed(0)
    cases = [case(rng, rng.randint(1, 2), 512, beyond=i % 2) for i in range(16)]
    answers = program([numbers for numbers, _, _ in cases])
    of_tiles = [answers[i::4] for i in range(4)]  # of 128 and 64, of queries and of keys
    for i, (numbers, kinds, units) in enumerate(cases):
        batch = numbers[0]
        listed = (kinds[:, :, :units] != HIDDEN).sum(-1)
        without = int((listed - 2 * END).clamp(min=0).sum())
        of_case = (answers_of[i] for answers_of in of_tiles)
        for of_unit, answer in zip((1, 2, 1, 2), of_case, strict=True):
            rows, blocks, wrong, beside, unknown = answer
            most = (batch - 1) * kinds.shape[2] + units
            assert (rows, wrong, beside, unknown) == (most, 0, 0, without)
            assert blocks % of_unit == 0
            assert blocks > 0 or (kinds != 1).any()


@pytest.mark.parametrize(
    ("batch", "heads", "options"),
    [
        (2, 4, {"batches": 1}),  # the hook asks for the batch entry
        (1, 4, {"of_heads": 4}),
        (1, 2, {"seqlen": 128}),  # too few share
        (50, 4, {"seqlen": 63}),  # Q has 512 bytes a row, its bits 32 KB a sequence
    ],
)
def test_what_is_not_shared_has_no_memory(program, batch, heads, options):
    torch.manual_seed(1)
    numbers, _, _ = case(random.Random(1), batch, heads, **options)
    assert program([numbers]) == [[0] * 5] * 4


@pytest.mark.parametrize(
    ("mask", "head", "batch"),
    [
        ("return key < position;", False, False),
        ("return ids[batch][key] < 3;", False, True),
        ("return key % (head + 2) == 0;", True, False),
        ("return key < heads[0];", False, False),
        (
            "auto const [b, h, q, k, i, j, p, sq, sk] = here;\nreturn k % (h + 2) == 0;",
            True,
            True,
        ),
    ],
)
def test_who_shares_is_seen_in_the_hook(mask, head, batch):
    source = hooks_source(SAME._replace(mask=mask), ())
    assert f"kMaskAsksHead = {str(head).lower()};" in source
    assert f"kMaskAsksBatch = {str(batch).lower()};" in source
