"""Which kernels answer calls to a cache, and calls of grouped heads without one. Nothing here needs
a GPU."""

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
    {{"p64", kBf16, 64, 64, false, false, nullptr, MaskClass::kAny, 192}, nullptr, nullptr},
    {{"p128", kBf16, 128, 128, false, false, nullptr, MaskClass::kAny, 192}, nullptr, nullptr}};
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

void show(char const* what, CachedCall const& call, int longest) {
  CacheKernels const kernels = choose_for_cache(kBf16, call, longest, 132);
  std::printf("%s: %s %s\\n", what, name_of(kernels.prefill), name_of(kernels.decode));
}

AttentionCall windowed(int seqlen, int heads_q, int heads_kv, int left, int head_dim) {
  AttentionCall call{};
  call.sizes = {2, seqlen, seqlen, heads_q, heads_kv, head_dim, head_dim};
  call.mask.left = left;
  call.mask.right = 0;
  call.scale = 1.f;
  return call;
}

void show(char const* what, AttentionCall const& call) {
  std::printf("%s: %s\\n", what, name_of(choose_grouped(kBf16, call)));
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

  show("window", windowed(4096, 64, 8, 127, 64));
  show("wide window", windowed(8192, 64, 8, 4095, 64));
  show("one head a key head", windowed(4096, 8, 8, 127, 64));
  show("padded head dim", windowed(4096, 64, 8, 127, 96));
  AttentionCall changed = windowed(4096, 64, 8, 127, 64);
  changed.softcap = 1.f;
  show("window with a softcap", changed);
  changed = windowed(4096, 64, 8, 127, 64);
  changed.mask.diagonal = 0;
  show("window with a diagonal", changed);
  changed = windowed(4096, 64, 8, 127, 128);
  changed.mask.left.reset();
  show("causal", changed);
}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    program = compile_program(MAIN, tmp_path_factory.mktemp("choice"))
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_calls_to_a_cache(said):
    assert said[:7] == [
        "decode: none d128",
        "chunks: p128 none",
        "mixed: p128 d128",
        "unknown: p128 d128",
        "one short chunk: none d128",
        "16 tokens: none d128",
        "softcap: none d128",
    ]


def test_calls_of_grouped_heads(said):
    assert said[7:] == [
        "window: p64",
        "wide window: none",
        "one head a key head: none",
        "padded head dim: none",
        "window with a softcap: none",
        "window with a diagonal: none",
        "causal: none",
    ]
