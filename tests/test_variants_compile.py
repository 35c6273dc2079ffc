"""Kernels of variants as plug-ins: what compilers make of hooks, and what they say of bad ones."""

import subprocess
from pathlib import Path

import pytest
import torch
from compilers import find_toolchain
from test_build import cuda_tools

import cute_kernels
from cute_kernels import Variant, variants
from cute_kernels.compile.hooks import KNOWN, hooks_source
from cute_kernels.plugins import compile_rows
from cute_kernels.variants.kernels import rows_of


@pytest.fixture
def toolchain(tmp_path, monkeypatch):
    find_toolchain()
    if not cute_kernels.tile_configs("forward"):
        pytest.skip("this build has no forward rows")
    monkeypatch.setenv("CUTE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", cuda_tools())


def test_a_variant_becomes_machine_code(toolchain, tmp_path):
    """Of a score, a mask, a weight and captured values."""
    every = Variant(
        "every",
        score="return tanh(score) + slopes[head] * (key - position);",
        mask="return ids[batch][query] == ids[batch][key];",
        weight="return uniform(seed, 0, batch, head, query, key) < rate ? 0.f : 1.f;",
        tensors={
            "slopes": ("float32", "head"),
            "ids": ("int32", "batch", None),
            "seed": ("int64",),
        },
        numbers={"rate": float},
    )
    rows = rows_of(every.hooks.key, torch.bfloat16, 64, False)
    (library,) = compile_rows(rows, tmp_path)
    code = subprocess.run(
        ["cuobjdump", "-sass", library], capture_output=True, text=True, check=True
    ).stdout
    assert "HGMMA" in code
    assert code.count("MUFU.RCP") >= 32  # tanh of each score
    assert code.count("IMAD.WIDE.U32") >= 10  # Philox' rounds


# What only kernels with captured tensors' gradients, or with weights, do.
PROBE = """
#include "cute_kernels/attention/backward/captured_gradients.hpp"
#include "cute_kernels/attention/backward/statistics.hpp"
#include "cute_kernels/attention/variant/hooks.hpp"

namespace cute_kernels::attention {
using namespace hook_math;
%s
struct Traits {
  using Variant = HookedVariant<Hooks>;
  using KeyBlock = SequenceKeyBlock;
  static constexpr int kTileN = 128, kConsumerWarps = 8;
};
struct Params {
  VariantArguments variant;
  int heads;
  int clusters;
};

__global__ void probe(Params const params, SequenceKeyBlock const coord, Sequence const sequence,
                      StatisticParts<64, true> const* parts, float* out) {
  auto rows = cute::make_tensor<float>(cute::Shape<cute::_2, cute::_4>{});
  struct {
    decltype(rows) of_captured[2];
  } probabilities;
  for (int i = 0; i < cute::size(rows); ++i) {
    rows(i) = out[i];
    for (auto& fragment : probabilities.of_captured) fragment(i) = out[8 + i];
  }
  SequencePlace const places(params.variant, 1, 2, sequence);
  CapturedGradients<Traits> gradients;
  gradients.add(params, rows, places, threadIdx.x, threadIdx.x, probabilities);
  gradients.finish_head(params, coord, places, 0);
  out[0] = parts->minus_delta(threadIdx.x) + parts->minus_lse(threadIdx.x);
}

}  // namespace cute_kernels::attention
"""


def test_nothing_is_undefined_on_the_device(toolchain, tmp_path):
    """What is, such as an array of the host's that device code reads, nvcc compiles all the same:
    it leaves a trap, and of the rest nothing."""
    hooks = Variant(
        "both",
        score="return score + slopes[head] * (key - query) + bias[query][key];",
        tensors={"slopes": ("float32", "head"), "bias": ("float32", "query", "key")},
    ).hooks
    source, out = tmp_path / "probe.cu", tmp_path / "probe.ptx"
    source.write_text(PROBE % hooks_source(hooks, ["slopes", "bias"]))
    command = find_toolchain().command(Path(cute_kernels.get_include()), source, out)
    kept = [part for part in command if part != "-shared" and not part.endswith("_map.cpp")]
    kept = [part for part in kept if not part.startswith("--generate-code")]
    done = subprocess.run(
        [*kept, "-ptx", "-arch=sm_90a"], capture_output=True, text=True, check=True
    )
    assert "warning" not in done.stderr, done.stderr
    code = out.read_text()
    assert "trap" not in code
    assert code.count("shfl.sync") == 5  # a sum over a warp
    assert code.count("st.global") == 8 + 1 + 1  # of each score, of the head, and what is read


def test_what_the_compiler_says_names_the_line(toolchain):
    broken = Variant("broken", score="float const x = score;\nreturn x + scores;")
    with pytest.raises(RuntimeError, match=r'score of variant broken"?[(:]2.*scores'):
        broken.compile(torch.bfloat16, 64, gradient=False)


def test_rows_of_a_variant():
    """Their names tell variants, head dims and gradients apart; each is a row that fits."""
    key = variants.alibi(torch.zeros(4)).variant.hooks.key
    assert key in KNOWN
    names = set()
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (8, 64, 72, 192, 256):
            for of in ((), ("slopes",)):
                if of and head_dim > 128:
                    with pytest.raises(NotImplementedError, match="no gradient of slopes"):
                        rows_of(key, dtype, head_dim, True, of)
                    continue
                rows = rows_of(key, dtype, head_dim, True, of)
                assert [row["pass"] for row in rows] == ["forward", "backward"]
                assert all(row["head_dim"] >= head_dim and row["variant"] == key for row in rows)
                names.update(row["name"] for row in rows)
    # Forward 64, 128, 192 and 256, backward 64, 128 and 256, and the first two with slopes
    assert len(names) == 2 * (4 + 3 + 2)


def test_rows_of_tensors_with_like_names_are_apart():
    """Each computes the gradients of its own."""
    names = ("a", "A", "a_of1_A", "a_of_A")
    alike = Variant(
        "alike",
        score=f"return score + {' + '.join(f'{name}[head]' for name in names)};",
        tensors=dict.fromkeys(names, ("float32", "head")),
    )
    some = [(), *((name,) for name in names), ("a", "A"), ("a", "a_of_A"), names]
    rows = {rows_of(alike.hooks.key, torch.bfloat16, 64, True, of)[1]["name"] for of in some}
    assert len(rows) == len(some)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.float32, 64), TypeError, "dtype is torch.float32"),
        ((torch.bfloat16, 300), ValueError, "head_dim is 300"),
        ((torch.bfloat16, "64"), TypeError, "head_dim is '64'"),
        ((torch.bfloat16, 64, {"of": ["slope"]}), ValueError, "of has 'slope'"),
    ],
)
def test_what_cannot_be_compiled(arguments, error, words):
    alibi = variants.alibi(torch.zeros(4)).variant
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error) as raised:
        alibi.compile(*positional, **keywords)
    assert words in str(raised.value)
