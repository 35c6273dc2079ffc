"""Which kernels answer calls to a cache. Nothing here needs a GPU."""

import subprocess

import pytest
from compilers import compile_program

MAIN = """
#include <cstdio>
#include "cute_kernels/attention/prefill/tile_config.hpp"

namespace cute_kernels::attention {
namespace {
constexpr auto kBf16 = ElementType::kBFloat16;
DecodeKernel const kDecode[] = {
    {{"d128", kBf16, 128, 128, false, false, nullptr, MaskClass::kAny, 128, 64}, nullptr, nullptr}};
PrefillKernel const kPrefill[] = {
    {{"p64", kBf16, 64, 64, false, false, nullptr, MaskClass::kAny, 192, 64}, nullptr, nullptr},
    {{"p128", kBf16, 128, 128, false, false, nullptr, MaskClass::kAny, 192, 64}, nullptr, nullptr}};
}  // namespace
KernelTable<DecodeKernel> decode_kernels{kDecode, 1};
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

void show(char const* what, CachedCall const& call, int longest, int page_size = 64) {
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

int main() {
  show("decode", cached(32, 32, 8, 8), 1);
  show("chunks", cached(4, 4 * 512, 8, 8), 512);
  show("mixed", cached(64, 4 * 512 + 60, 8, 8), 512);
  show("unknown", cached(64, 4 * 512 + 60, 8, 8), 4 * 512 + 60);
  show("one short chunk", cached(1, 64, 8, 8), 64);
  show("16 tokens", cached(32, 32 * 16, 8, 8), 16);
  CachedCall capped = cached(4, 4 * 512, 8, 8);
  capped.softcap = 1.f;
  show("softcap", capped, 512);
  show("pages of 528", cached(4, 4 * 512, 8, 8), 512, 528);
  show("pages of 100", cached(4, 4 * 512, 8, 8), 512, 100);
}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    program = compile_program(MAIN, tmp_path_factory.mktemp("choice"))
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_calls_to_a_cache(said):
    assert said == [
        "decode: none d128",
        "chunks: p128 none",
        "mixed: p128 d128",
        "unknown: p128 d128",
        "one short chunk: none d128",
        "16 tokens: none d128",
        "softcap: none d128",
        "pages of 528: p128 none",
        "pages of 100: none d128",
    ]
