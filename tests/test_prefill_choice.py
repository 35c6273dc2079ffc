"""Which kernels answer calls to a cache. Nothing here needs a GPU."""

import subprocess

import pytest
from compilers import compile_program

MAIN = """
#include <cstdio>
#include "cute_kernels/attention/decode/fp8_tile_config.hpp"
#include "cute_kernels/attention/prefill/tile_config.hpp"

namespace cute_kernels::attention {
namespace {
constexpr auto kBf16 = ElementType::kBFloat16;
constexpr DecodeKernel row(char const* name, int head_dim, int heads, int least_rows = 0) {
  return {{name, kBf16, head_dim, head_dim, false, false, nullptr, MaskClass::kAny, 128, 64, heads,
           least_rows},
          nullptr, nullptr};
}
DecodeKernel const kDecode[] = {row("d64", 64, 1), row("d64h2", 64, 2), row("d128", 128, 1),
                                row("d128many", 128, 1, 65)};
PrefillKernel const kPrefill[] = {
    {{"p64", kBf16, 64, 64, false, false, nullptr, MaskClass::kAny, 192, 64}, nullptr, nullptr},
    {{"p128", kBf16, 128, 128, false, false, nullptr, MaskClass::kAny, 192, 64}, nullptr, nullptr}};
constexpr auto kFp8 = CacheType::kEightBits;
constexpr Fp8DecodeKernel row8(char const* name, int head_dim, int tile_m, int least_rows = 0) {
  return {{name, kFp8, head_dim, head_dim, false, false, nullptr, MaskClass::kAny, tile_m, 64,
           least_rows},
          nullptr, nullptr};
}
Fp8DecodeKernel const kEightBits[] = {row8("many128", 128, 128), row8("few128", 128, 32),
                                      row8("many64", 64, 128), row8("few256", 256, 32),
                                      row8("more128", 128, 128, 65),
                                      row8("chunks128", 128, 192, 129)};
}  // namespace
KernelTable<Fp8DecodeKernel> fp8_decode_kernels{kEightBits, 6};
KernelTable<DecodeKernel> decode_kernels{kDecode, 4};
KernelTable<PrefillKernel> prefill_kernels{kPrefill, 2};
}  // namespace cute_kernels::attention
using namespace cute_kernels::attention;

template <class Kernel>
char const* name_of(Kernel const* kernel) {
  return kernel == nullptr ? "none" : kernel->config.name;
}

CachedCall cached(int batch, int total_q, int heads_kv, int group) {
  CachedCall call{};
  call.batch = batch;
  call.total_q = total_q;
  call.heads_kv = heads_kv;
  call.group = group;
  call.heads_q = heads_kv * group;
  call.head_dim = call.head_dim_v = 128;
  return call;
}

void show(char const* what, CachedCall const& call, std::optional<int64_t> longest,
          int page_size = 64) {
  DecodeProblem problem{};
  problem.call = call;
  problem.call.most_keys = 1 << 20;
  int const table[] = {0};
  problem.pages = {table, 1, nullptr, 1000, page_size, 1 << 14};
  problem.k = problem.v = {nullptr, page_size * 1024, 1024, 128};
  problem.device = {0, 132};
  CacheKernels const kernels = choose_for_cache(kBf16, problem, longest);
  std::printf("%s: %s %s\\n", what, name_of(kernels.prefill), name_of(kernels.decode));
}

void show64(char const* what, CachedCall call, std::optional<int64_t> longest = {}) {
  call.head_dim = call.head_dim_v = 64;
  show(what, call, longest);
}

void show8(char const* what, CachedCall const& call, std::optional<int64_t> longest = {}) {
  int64_t const rows = rows_of_longest(call, longest);
  std::printf("%s: %s\\n", what, name_of(choose_fp8_decode(fp8_decode_kernels, call, rows,
                                                               mean_rows(call))));
}

void show_all8() {
  auto of_head_dim = [](int head_dim, int queries) {
    CachedCall call = cached(1, queries, 8, 8);
    call.head_dim = call.head_dim_v = head_dim;
    return call;
  };
  show8("one token", cached(32, 32, 8, 8), 1);
  show8("32 rows", cached(32, 32 * 4, 8, 8), 4);
  show8("33 rows", cached(32, 32 * 33, 8, 1), 33);
  show8("65 rows", cached(32, 32 * 65, 8, 1), 65);
  show8("128 rows", cached(32, 32 * 16, 8, 8), 16);
  show8("65 rows, or one", cached(32, 32 * 2, 8, 1), 65);
  show8("129 rows", cached(32, 32 * 129, 8, 1), 129);
  show8("a chunk", cached(2, 513, 8, 8), 512);
  show8("a chunk of 32", cached(32, 512 + 31, 8, 4), 512);
  show8("padded length", cached(1, 4, 8, 8), 512);
  show8("unknown, alike", cached(32, 32, 8, 8));
  show8("unknown, 5 of 32 queries", cached(32, 32 * 5 - 31, 8, 8));
  show8("no queries", cached(0, 0, 8, 8));
  show8("one kind, few", of_head_dim(64, 1), 1);
  show8("one kind, many", of_head_dim(256, 100), 100);
  show8("none", of_head_dim(320, 1), 1);
  static Fp8DecodeKernel const mine[] = {row8("mine32", 128, 32), row8("mine64", 128, 64)};
  for (auto const& kernel : mine) fp8_decode_kernels.add(kernel);
  show8("added", cached(32, 32, 8, 8), 1);
  show8("added, 64 rows", cached(32, 32 * 8, 8, 8), 8);
  show8("added, 65 rows", cached(32, 32 * 65, 8, 1), 65);
}

int main() {
  show("decode", cached(32, 32, 8, 8), 1);
  show("chunks", cached(4, 4 * 512, 8, 8), 512);
  show("mixed", cached(64, 4 * 512 + 60, 8, 8), 512);
  show("unknown", cached(64, 4 * 512 + 60, 8, 8), {});
  show("one short chunk", cached(1, 64, 8, 8), 64);
  show("16 tokens", cached(32, 32 * 16, 8, 8), 16);
  show("8 tokens", cached(32, 32 * 8, 8, 8), 8);
  show("16 tokens, or one", cached(32, 32 * 2, 8, 8), 16);
  CachedCall capped = cached(4, 4 * 512, 8, 8);
  capped.softcap = 1.f;
  show("softcap", capped, 512);
  show("pages of 528", cached(4, 4 * 512, 8, 8), 512, 528);
  show("pages of 100", cached(4, 4 * 512, 8, 8), 512, 100);
  show64("one token", cached(32, 32, 8, 8), 1);
  show64("8 tokens", cached(32, 32 * 8, 8, 8), 8);
  show64("9 tokens", cached(32, 32 * 9, 8, 8), 9);
  show64("3 key heads", cached(32, 32, 3, 8), 1);
  show64("unknown, alike", cached(32, 32, 8, 8));
  show64("unknown, more", cached(32, 32 * 8 + 1, 8, 8));
  show_all8();
}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    program = compile_program(MAIN, tmp_path_factory.mktemp("choice"))
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_calls_to_a_cache(said):
    assert said[:17] == [
        "decode: none d128",
        "chunks: p128 none",
        "mixed: p128 d128",
        "unknown: p128 d128",
        "one short chunk: none d128many",
        "16 tokens: none d128many",
        "8 tokens: none d128",
        "16 tokens, or one: none d128",
        "softcap: none d128many",
        "pages of 528: p128 none",
        "pages of 100: none d128many",
        "one token: none d64h2",
        "8 tokens: none d64h2",
        "9 tokens: none d64",
        "3 key heads: none d64",
        "unknown, alike: none d64h2",
        "unknown, more: p64 d64",
    ]


def test_calls_to_a_cache_of_8_bits(said):
    """The smallest tile that holds all rows of the longest sequence, or the largest, of rows for
    as many in the mean."""
    assert said[17:] == [
        "one token: few128",
        "32 rows: few128",
        "33 rows: many128",
        "65 rows: more128",
        "128 rows: more128",
        "65 rows, or one: many128",
        "129 rows: chunks128",
        "a chunk: chunks128",
        "a chunk of 32: more128",
        "padded length: few128",
        "unknown, alike: few128",
        "unknown, 5 of 32 queries: many128",
        "no queries: few128",
        "one kind, few: many64",
        "one kind, many: few256",
        "none: none",
        "added: mine32",
        "added, 64 rows: mine64",
        "added, 65 rows: more128",
    ]
