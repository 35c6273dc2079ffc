"""The search for the fastest row: all of it but nvcc and the clock, which are stand-ins here. Rows
are added to processes of their own."""

import errno
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
from cute_kernels import tune
from cute_kernels.autotune import timing, tuned, tuner
from cute_kernels.compile.passes import FP8_DTYPES, PASSES
from cute_kernels.compile.search import SPACES, search_space
from cute_kernels.compile.table import problems

DTYPES = {"forward": "bf16", "backward": "bf16", "forward_fp8": "int8"}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("of_pass", SPACES)
def test_the_search_space_holds_what_fits_and_counts_the_rest(of_pass, head_dim):
    dtype = DTYPES[of_pass]
    rows, refused = search_space(of_pass, dtype, head_dim)
    assert len({row["name"] for row in rows}) == len(rows) > 3
    for row in rows:
        assert problems({**row, "dtypes": [dtype]}, PASSES[of_pass]) == []
        assert (row["pass"], row["mask"]) == (of_pass, "none")
    whole = 1
    for values in SPACES[of_pass].values():
        whole *= len(values)
    assert len(rows) < whole <= len(rows) + sum(refused.values())
    assert {"registers of a consumer thread", "shared memory"} & set(refused)
    tiles = [(row["tile_m"], row["tile_n"]) for row in rows]
    first = tiles[: len(set(tiles))]
    assert len(set(first)) == len(first)  # one of each before a second one
    assert sorted(first, key=lambda tile: 1 / tile[0] + 1 / tile[1]) == first


@pytest.mark.parametrize("of_pass", SPACES)
def test_what_is_there_is_not_tried_again(of_pass):
    dtype = DTYPES[of_pass]
    rows, _ = search_space(of_pass, dtype, 128)
    fewer, _ = search_space(of_pass, dtype, 128, rows[:3])
    assert {row["name"] for row in rows[3:]} == {row["name"] for row in fewer}
    other = "e4m3" if dtype in FP8_DTYPES else "fp16"
    others = search_space(of_pass, other, 128, rows[:3]).rows
    assert others[0]["name"].startswith(f"{other}_")
    assert {row.get("moves_of_four", 0) for row in others} == {0}


def test_rows_take_turns():
    order, samples = [], {"a": iter([3.0, 1.0, 9.0]), "b": iter([2.0, 2.0, 2.5])}

    def call(name):
        return lambda: order.append(name)

    def timer(call):
        call()
        return next(samples[order[-1]])

    found = timing.measure({name: call(name) for name in "ab"}, timer, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert list(found.items()) == [("b", [2.0, 2.0, 2.5]), ("a", [3.0, 1.0, 9.0])]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"of_pass": "sideways"}, ValueError, "of_pass is 'sideways', must be one of forward, ba"),
        ({"candidates": -1}, ValueError, "candidates is -1, must be at least 0"),
        ({"jobs": 0}, ValueError, "jobs is 0, must be at least 1"),
        ({"timer": None}, ValueError, "q is on cpu, must be on a GPU"),
        ({"q": torch.zeros(1, 8, 2, 64)}, TypeError, "q has dtype torch.float32, must be float16"),
        ({"qk_dtype": torch.float16}, TypeError, "qk_dtype is torch.float16, must be int8 or"),
        ({"k": torch.zeros(1, 8, 2, 72).bfloat16()}, ValueError, "k"),
        ({"q": torch.zeros(1, 0, 2, 64).bfloat16()}, ValueError, "must not be empty"),
    ],
)
def test_what_is_no_call_is_refused(changes, error, message):
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 8, 8, 2)
    arguments = {"q": q, "k": k, "v": v, "timer": lambda call: 1.0, "candidates": 0, **changes}
    with pytest.raises(error, match=message):
        tune(**arguments)


def entry(name, seqlen=64, headers="0"):
    kind = {"gpu": "none", "headers": headers, "pass": "forward", "dtype": "bf16"}
    kind["sizes"] = {"seqlen_q": seqlen}
    return {"kind": kind, "row": {"name": name}, "seconds": {name: 1.0}}


def test_the_last_of_a_kind_is_remembered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_KERNELS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / tuned.FILE
    assert tuned.read(path) == []
    for found in (entry("a"), entry("b", 128), entry("c")):
        tuned.remember(found)
    assert tuned.read(path) == [entry("b", 128), entry("c")]
    assert capsys.readouterr().err == ""
    for wrong in ("{", "[1]", '{"kind": 1}', json.dumps([{"kind": {}}])):
        path.write_text(wrong)
        assert tuned.read(path) == []
        assert "tuned.json is not what tune wrote" in capsys.readouterr().err
    tuned.remember(entry("d"))
    assert tuned.read(path) == [entry("d")]
    assert sorted(file.name for file in path.parent.iterdir()) == [".tuned.json.lock", "tuned.json"]
    monkeypatch.setenv("CUTE_KERNELS_CACHE", "/dev/null/cache")
    capsys.readouterr()
    tuned.remember(entry("e"))
    assert "cannot write /dev/null/cache/tuned.json" in capsys.readouterr().err


def test_what_other_builds_and_gpus_found_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuner, "_gpu", lambda: "none")
    _, headers = torch.ops.cute_kernels.plugin_requirements()
    tuned.remember(entry("a"))
    assert tuner.use_tuned() == []
    monkeypatch.setattr(tuner, "tile_configs", lambda *_: [])  # a build without the pass
    tuned.remember(entry("a", headers=headers))
    assert tuner.use_tuned() == []
    monkeypatch.setattr(tuner, "_gpu", lambda: "another")
    assert tuner.use_tuned() == []


def test_a_full_disk_leaves_what_was_remembered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_KERNELS_CACHE", str(tmp_path))
    tuned.remember(entry("a"))

    def full(content, file, **_):
        file.write("[{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tuned.json, "dump", full)
    tuned.remember(entry("b"))
    assert "tuned.json, what was found is for this process alone: " in capsys.readouterr().err
    assert tuned.read(tmp_path / tuned.FILE) == [entry("a")]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".tuned.json.lock", "tuned.json"]
    with pytest.raises(OSError, match="No space left"):
        tuned.write_record(tmp_path / "record.json", [])


SEARCH = """
import subprocess
import sys
from pathlib import Path

import torch
from compilers import find_toolchain
import cute_kernels
from cute_kernels import plugins
from cute_kernels.autotune import timing, trials, tuned, tuner
from cute_kernels.compile.nvcc import CompilerError
from cute_kernels.compile.passes import PASSES
from cute_kernels.compile.source import functions, kernel_entry, namespace

of_pass, dtype = sys.argv[1:]
PASS = PASSES[of_pass]
PLUGIN = '''
#include "cute_kernels/attention/plugin.hpp"
namespace cute_kernels::attention::tiles::%s {
%s
}
extern "C" __attribute__((visibility("default"))) cute_kernels::attention::Plugin const*
cute_kernels_plugin() {
  using namespace cute_kernels::attention;
  static %sKernel const kernel%s;
  static Plugin const plugin = plugin_of(kernel, "%s");
  return &plugin;
}
'''
# Kernels that cannot be launched.
BODIES = "".join(text.replace(";", " { return {}; }\\n") for text in functions(PASS).values())
include, toolchain = Path(cute_kernels.get_include()), find_toolchain()
_, headers = torch.ops.cute_kernels.plugin_requirements()

def build(rows, include, root, jobs=None):
    # The last of several does not compile.
    libraries = {}
    for row in rows[: max(1, len(rows) - 1)]:
        source, library = Path(row["name"] + ".cpp"), Path(row["name"] + ".so").absolute()
        parts = namespace(row), BODIES, PASS.cpp, kernel_entry(row, PASS), headers
        source.write_text(PLUGIN % parts)
        if not library.exists():
            subprocess.run(toolchain.command(include, source, library), check=True)
        libraries[row["name"]] = library
    failed = {row["name"]: CompilerError("ptxas gives up") for row in rows[len(libraries) :]}
    return libraries, failed

plugins.build_what_compiles = build
plugins.build = lambda rows, *_: list(build([*rows, *rows], *_)[0].values())
q, k, v = torch.randn(3, 2, 200, 4, 64).bfloat16()
choose = torch.ops.cute_kernels.choose_tile_config

def chosen(batch, seqlen_q, seqlen_k, heads, causal=False):
    sizes = batch, seqlen_q, seqlen_k, heads, 64, causal, 132
    return choose(trials.DTYPES[dtype], *sizes, of_pass=of_pass)
"""

FIND = f"""{SEARCH}
before = chosen(2, 200, 200, 4)
rows = tuner.tune_rows(of_pass, dtype, 64, 4).rows
fast, wrong, slow, broken = (row["name"] for row in rows)
bind, refusing = trials.bind, ""

def bind_with_errors(*arguments):
    run = bind(*arguments)
    def answer(name):
        results = run(name)
        if name == refusing:
            raise RuntimeError("invalid argument")
        if name == wrong:
            results[0][:, -1] = 0
        return results
    return answer

timed = []

def named(call):
    (name,) = (c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, str))
    return name

def timer(call):
    timed.append(named(call))
    call()
    return {{fast: 0.5e-3, before: 1e-3}}.get(timed[-1], 2e-3)

def search(timer, **options):
    options = {{"of_pass": of_pass, "candidates": 4, "timer": timer, **options}}
    return cute_kernels.tune(q, k, v, **options)

trials.bind = tuner.bind = bind_with_errors
found = search(timer, keep=False, record="record.json")
assert (found.name, found.automatic) == (fast, before) == (fast, chosen(2, 200, 200, 4))
assert not Path("tuned.json").exists()
assert next(iter(found.seconds.items())) == (fast, 0.5e-3)
assert set(timed) == set(found.seconds) >= {{fast, slow, before}}
assert timed.count(fast) == timed.count(before) == timed.count(slow) * 2  # again, alone
assert set(found.failed) == {{wrong, broken}}
assert found.failed[broken] == "ptxas gives up"
result = trials.RESULTS[of_pass][0]
begin = "wrong for 113 queries and 1000 keys: a row of the " + result
assert found.failed[wrong].startswith(begin), found.failed
assert sum(found.refused.values()) > 0
assert tuned.read_record("record.json") == [found]
print(found.table())

# What is less than 1% faster does not replace it, nor what is so only once
level = search(lambda call: 1.0, candidates=0)
assert (level.name, level.refused) == (before, {{}})
once = iter([0.5] * timing.ROUNDS)
assert search(lambda call: next(once, 1.0) if named(call) == fast else 1.0).name == before
refusing = fast
assert search(timer).failed[fast] == "fails: invalid argument"
trials.bind = tuner.bind = bind

# Of its kind alone: lengths and heads in powers of two
assert search(timer).name == fast
assert chosen(2, 200, 200, 4) == chosen(1, 129, 256, 8) == chosen(8, 256, 129, 1) == fast
others = [(2, 128, 200, 4), (2, 257, 200, 4), (2, 200, 128, 4), (2, 200, 200, 5), (1, 200, 200, 4)]
names = {{row["name"] for row in cute_kernels.tile_configs(of_pass) if row["mask"] == "none"}}
assert names >= {{fast, slow}}
assert not names & {{chosen(*other) for other in others}}
assert not names & {{chosen(2, 200, 200, 4, True)}}
"""

USE = f"""{SEARCH}
before = chosen(2, 200, 200, 4)
(fast,) = cute_kernels.use_tuned()
assert before != fast == chosen(2, 200, 200, 4)
assert cute_kernels.use_tuned() == [fast]
assert [row["name"] for row in cute_kernels.tile_configs(of_pass)].count(fast) == 1
try:
    torch.ops.cute_kernels.prefer_tile_config("none", 1, 1, 1, 1, 64, False)
except RuntimeError as error:
    print(error)
try:
    torch.ops.cute_kernels.prefer_tile_config(fast, 1, 1, 1, 1, 72, False)
except RuntimeError as error:
    print(error)
"""


def python(code: str, folder: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {"PYTHONPATH": path, "CUTE_KERNELS_CACHE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def skip_without_rows(of_pass):
    if not any(
        row["head_dim"] == 64 and row["dtype"] == DTYPES[of_pass]
        for row in cute_kernels.tile_configs(of_pass)
    ):
        pytest.skip(f"this build has no {of_pass} rows of {DTYPES[of_pass]} with head_dim 64")


@pytest.mark.parametrize("of_pass", SPACES)
def test_the_fastest_right_row_is_found_chosen_and_remembered(tmp_path, of_pass):
    find_toolchain()
    skip_without_rows(of_pass)
    table = python(FIND, tmp_path, of_pass, DTYPES[of_pass]).splitlines()
    assert table[1].split()[1:] == ["500.0", "2.000"]
    assert any(line.endswith("1000.0   1.000  <- automatic choice before") for line in table)
    assert table[-1] == f"fastest: {table[1].split()[0]}"
    assert len(json.loads((tmp_path / tuned.FILE).read_text())) == 1
    refusals = python(USE, tmp_path, of_pass, DTYPES[of_pass]).splitlines()
    assert refusals[0].endswith("tile_config none is not a row of this build")
    assert refusals[1].endswith("takes head_dim up to 64, and head_dim is 72")


def test_the_command_without_a_gpu(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    skip_without_rows("forward")
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
    assert rows == tuner.tune_rows("forward", "bf16", 64, 2).rows
    assert capsys.readouterr().out.startswith("2 kernels in ")
    arguments[2] = "264"
    assert command_line.main([*arguments, "--compile-only"]) == 1
    assert "head_dim is 264, and this build has no forward row of bf16" in capsys.readouterr().err
    for of_pass, multiple in (("forward", 8), ("forward_fp8", 16)):
        odd = ["tune", "--pass", of_pass, "--head-dim", "60", "--seqlen", "10", "--compile-only"]
        assert command_line.main(odd) == 1
        assert f"head_dim is 60, must be a multiple of {multiple}" in capsys.readouterr().err


ON_GPU = """
import sys
import torch
import cute_kernels

q, k, v = torch.randn(3, 2, 1024, 8, 64, device="cuda", dtype=torch.bfloat16)
options = {"of_pass": sys.argv[1], "causal": True, "candidates": int(sys.argv[2])}
found = cute_kernels.tune(q, k, v, **options)
assert found.failed == {}, found.failed
assert found.seconds[found.name] <= found.seconds[found.automatic]
assert all(1e-6 < seconds < 1e-2 for seconds in found.seconds.values())
assert cute_kernels.use_tuned() == [found.name]
print(found.table())
"""


@pytest.mark.parametrize(
    ("of_pass", "candidates"), [("forward", 1), ("backward", 0), ("forward_fp8", 0)]
)
def test_rows_are_timed_on_the_gpu(hopper, tmp_path, of_pass, candidates):
    skip_without_rows(of_pass)
    if candidates:
        find_toolchain()
    table = python_on_gpu(ON_GPU, tmp_path, of_pass, str(candidates))
    assert "fastest: " in table


def python_on_gpu(code: str, folder: Path, *arguments: str) -> str:
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "CUTE_KERNELS_CACHE": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
