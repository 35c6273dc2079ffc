"""The search for the fastest row: all of it but nvcc and the clock, which are stand-ins here. Rows
are added to processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compilers import find_toolchain
from parity import random_qkv

import cute_kernels
from cute_kernels import __main__ as command_line
from cute_kernels import autotune, tune
from cute_kernels.compile.passes import PASSES
from cute_kernels.compile.search import SPACE, search_space
from cute_kernels.compile.table import problems


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_search_space_holds_what_fits_and_counts_the_rest(head_dim):
    rows, refused = search_space("bf16", head_dim)
    assert len({row["name"] for row in rows}) == len(rows) > 20
    for row in rows:
        assert problems({**row, "dtypes": ["bf16"]}, PASSES["forward"]) == []
    whole = 1
    for values in SPACE.values():
        whole *= len(values)
    assert len(rows) < whole <= len(rows) + sum(refused.values())
    assert {"registers of a consumer thread", "shared memory"} <= set(refused)
    tiles = [(row["tile_m"], row["tile_n"]) for row in rows]
    first = tiles[: len(set(tiles))]
    assert len(set(first)) == len(first)  # one of each before a second one
    assert sorted(first, key=lambda tile: 1 / tile[0] + 1 / tile[1]) == first


def test_what_is_there_is_not_tried_again():
    rows, _ = search_space("bf16", 128)
    fewer, _ = search_space("bf16", 128, rows[:3])
    assert {row["name"] for row in rows[3:]} == {row["name"] for row in fewer}
    assert search_space("fp16", 128, rows[:3]).rows[0]["name"].startswith("fp16_")


def test_rows_take_turns_and_the_median_counts():
    order, samples = [], {"a": iter([3.0, 1.0, 9.0]), "b": iter([2.0, 2.0, 2.5])}

    def call(name):
        return lambda: order.append(name)

    def timer(call):
        call()
        return next(samples[order[-1]])

    found = autotune.measure({name: call(name) for name in "ab"}, timer, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert list(found.items()) == [("b", 2.0), ("a", 3.0)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"candidates": -1}, ValueError, "candidates is -1, must be at least 0"),
        ({"jobs": 0}, ValueError, "jobs is 0, must be at least 1"),
        ({"timer": None}, ValueError, "q is on cpu, must be on a GPU"),
        ({"q": torch.zeros(1, 8, 2, 64)}, TypeError, "q has dtype torch.float32, must be float16"),
        ({"k": torch.zeros(1, 8, 2, 72).bfloat16()}, ValueError, "k"),
        ({"q": torch.zeros(1, 0, 2, 64).bfloat16()}, ValueError, "must not be empty"),
    ],
)
def test_what_is_no_call_is_refused(changes, error, message):
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 8, 8, 2)
    arguments = {"q": q, "k": k, "v": v, "timer": lambda call: 1.0, "candidates": 0, **changes}
    with pytest.raises(error, match=message):
        tune(**arguments)


def entry(name, seqlen=64):
    kind = {"gpu": "none", "headers": "0", "dtype": "bf16", "sizes": {"seqlen_q": seqlen}}
    return {"kind": kind, "row": {"name": name}, "seconds": {name: 1.0}}


def test_the_last_of_a_kind_is_remembered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_KERNELS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / autotune.FILE
    assert autotune.read(path) == []
    for found in (entry("a"), entry("b", 128), entry("c")):
        autotune._remember(found)
    assert autotune.read(path) == [entry("b", 128), entry("c")]
    assert capsys.readouterr().err == ""
    for wrong in ("{", "[1]", '{"kind": 1}', json.dumps([{"kind": {}}])):
        path.write_text(wrong)
        assert autotune.read(path) == []
        assert "tuned.json is not what tune wrote" in capsys.readouterr().err
    autotune._remember(entry("d"))
    assert autotune.read(path) == [entry("d")]
    assert sorted(file.name for file in path.parent.iterdir()) == [".tuned.json.lock", "tuned.json"]
    monkeypatch.setenv("CUTE_KERNELS_CACHE", "/dev/null/cache")
    capsys.readouterr()
    autotune._remember(entry("e"))
    assert "cannot write /dev/null/cache/tuned.json" in capsys.readouterr().err


SEARCH = """
import subprocess
import sys
from pathlib import Path

import torch
from compilers import find_toolchain
import cute_kernels
from cute_kernels import autotune, flash_attn_func, plugins
from cute_kernels.compile.nvcc import CompilerError
from cute_kernels.compile.passes import PASSES
from cute_kernels.compile.source import kernel_entry, namespace

PLUGIN = '''
#include "cute_kernels/attention/plugin.hpp"
namespace cute_kernels::attention::tiles::%s {
int64_t workspace_bytes(ForwardProblem const&) { return 0; }
cudaError_t launch(ForwardProblem const&, cudaStream_t) { return cudaErrorNotSupported; }
}
extern "C" __attribute__((visibility("default"))) cute_kernels::attention::Plugin const*
cute_kernels_plugin() {
  using namespace cute_kernels::attention;
  static ForwardKernel const kernel%s;
  static Plugin const plugin = plugin_of(kernel, "%s");
  return &plugin;
}
'''
include, toolchain = Path(cute_kernels.get_include()), find_toolchain()
_, headers = torch.ops.cute_kernels.plugin_requirements()

def build(rows, include, root, jobs=None):
    # Kernels that cannot be launched; the last of several does not compile.
    libraries = {}
    for row in rows[: max(1, len(rows) - 1)]:
        source, library = Path(row["name"] + ".cpp"), Path(row["name"] + ".so").absolute()
        text = PLUGIN % (namespace(row), kernel_entry(row, PASSES["forward"]), headers)
        source.write_text(text)
        if not library.exists():
            subprocess.run(toolchain.command(include, source, library), check=True)
        libraries[row["name"]] = library
    failed = {row["name"]: CompilerError("ptxas gives up") for row in rows[len(libraries) :]}
    return libraries, failed

plugins.build_what_compiles = build
plugins.build = lambda rows, *_: list(build([*rows, *rows], *_)[0].values())
q, k, v = torch.randn(3, 2, 200, 4, 64).bfloat16()
sizes = (2, 200, 200, 4, 64, False)
choose = torch.ops.cute_kernels.choose_tile_config

def chosen(batch, seqlen_q, seqlen_k, heads, causal=False, dtype=torch.bfloat16):
    return choose(dtype, batch, seqlen_q, seqlen_k, heads, 64, causal, 132)
"""

FIND = f"""{SEARCH}
before = chosen(2, 200, 200, 4)
rows = autotune.tune_rows(q.dtype, 64, 4).rows
fast, wrong, slow, broken = (row["name"] for row in rows)

def call(*arguments, tile_config=None, **options):
    result = flash_attn_func(*arguments, tile_config=tile_config, **options)
    if tile_config == wrong:
        result[0][:, -1] = 0
    return result

timed = []

def timer(call):
    (name,) = (c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, str))
    timed.append(name)
    call()
    return {{fast: 0.5e-3, before: 1e-3}}.get(name, 2e-3)

autotune.flash_attn_func = call
found = cute_kernels.tune(q, k, v, candidates=4, timer=timer)
assert (found.name, found.automatic) == (fast, before)
assert next(iter(found.seconds.items())) == (fast, 0.5e-3)
assert set(timed) == set(found.seconds) >= {{fast, slow, before}}
assert set(found.failed) == {{wrong, broken}}
assert found.failed[broken] == "ptxas gives up"
assert found.failed[wrong].startswith("wrong for 113 queries and 1000 keys: a row of the output")
assert found.refused["shared memory"] > 0
print(found.table())

# Of its kind alone: lengths and heads in powers of two
assert chosen(2, 200, 200, 4) == chosen(1, 129, 256, 8) == chosen(8, 256, 129, 1) == fast
others = [(2, 128, 200, 4), (2, 257, 200, 4), (2, 200, 128, 4), (2, 200, 200, 5), (1, 200, 200, 4)]
assert fast not in [chosen(*other) for other in others]
assert fast != chosen(2, 200, 200, 4, True)

# What is less than 1% faster does not replace it
again = cute_kernels.tune(q, k, v, candidates=4, timer=lambda call: 1.0)
assert again.name == again.automatic == fast
"""

USE = f"""{SEARCH}
before = chosen(2, 200, 200, 4)
(fast,) = cute_kernels.use_tuned()
assert before != fast == chosen(2, 200, 200, 4)
assert cute_kernels.use_tuned() == [fast]
assert [row["name"] for row in cute_kernels.tile_configs("forward")].count(fast) == 1
try:
    torch.ops.cute_kernels.prefer_tile_config("none", 1, 1, 1, 1, 64, False)
except RuntimeError as error:
    print(error)
try:
    torch.ops.cute_kernels.prefer_tile_config(fast, 1, 1, 1, 1, 72, False)
except RuntimeError as error:
    print(error)
"""


def python(code: str, folder: Path) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {"PYTHONPATH": path, "CUTE_KERNELS_CACHE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_fastest_right_row_is_found_chosen_and_remembered(tmp_path):
    find_toolchain()
    if not any(row["head_dim"] == 64 for row in cute_kernels.tile_configs("forward")):
        pytest.skip("this build has no forward rows of head_dim 64")
    table = python(FIND, tmp_path).splitlines()
    assert table[1].split()[1:] == ["500.0", "2.000"]
    assert any(line.endswith("1000.0   1.000  <- automatic choice before") for line in table)
    assert table[-1] == f"fastest: {table[1].split()[0]}"
    assert len(json.loads((tmp_path / autotune.FILE).read_text())) == 1
    refusals = python(USE, tmp_path).splitlines()
    assert refusals[0].endswith("tile_config none is not a forward row of this build")
    assert refusals[1].endswith("takes head_dim up to 64, and head_dim is 72")


def test_the_command_without_a_gpu(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    arguments = ["tune", "--head-dim", "64", "--seqlen", "128", "--causal", "--candidates", "2"]
    assert command_line.main(arguments) == 1
    assert "PyTorch sees no GPU" in capsys.readouterr().err
    tried = []

    def compile_candidates(rows, jobs):
        tried.append((rows, jobs))
        return {row["name"]: Path("kernel.so") for row in rows}, {}

    monkeypatch.setattr(command_line, "compile_candidates", compile_candidates)
    assert command_line.main([*arguments, "--compile-only", "-j", "3"]) == 0
    ((rows, jobs),) = tried
    assert jobs == 3
    assert rows == autotune.tune_rows(torch.bfloat16, 64, 2).rows
    assert capsys.readouterr().out.startswith("2 kernels in ")
    with pytest.raises(ValueError, match="head_dim is 264, and this build has no"):
        autotune.tune_rows(torch.bfloat16, 264, 2)


ON_GPU = """
import torch
import cute_kernels

q, k, v = torch.randn(3, 2, 1024, 8, 64, device="cuda", dtype=torch.bfloat16)
found = cute_kernels.tune(q, k, v, causal=True, candidates=1)
assert found.failed == {}
assert found.seconds[found.name] <= found.seconds[found.automatic]
assert all(1e-6 < seconds < 1e-2 for seconds in found.seconds.values())
assert cute_kernels.use_tuned() == [found.name]
print(found.table())
"""


def test_rows_are_timed_on_the_gpu(hopper, tmp_path):
    find_toolchain()
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", ON_GPU],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "CUTE_KERNELS_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "fastest: " in done.stdout
