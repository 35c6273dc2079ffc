"""Rows of the user's own, compiled by nvcc and loaded: what docs/extend.md says. One kernel is
compiled, once; it runs only on a Hopper GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from compilers import compile_program, find_toolchain
from configure import ROOT
from conftest import no_hopper
from test_build import cuda_tools, instructions

import cute_kernels
from cute_kernels import __main__ as command_line

ROW = {
    **{"dtype": "bf16", "head_dim": 64, "tile_m": 64, "tile_n": 64, "pingpong": False},
    **{"name": "bf16_mine", "speed": 0.6, "overhead": 100},
}
BLOCK = r"<!-- {} -->\n\n?```\w*\n(.*?)```"


def block(marker: str) -> str:
    """The fenced block behind a marker in docs/extend.md."""
    text = (ROOT / "docs" / "extend.md").read_text()
    (found,) = re.findall(BLOCK.format(marker), text, re.S)
    return found


class Ran(NamedTuple):
    out: str
    said: str
    folder: Path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The folder of the one kernel, in which python() runs."""
    find_toolchain()
    if not any(row["head_dim"] == 64 for row in cute_kernels.tile_configs("forward")):
        pytest.skip("this build has no forward rows of head_dim 64 to choose among")
    folder = tmp_path_factory.mktemp("extend")
    (folder / "rows.toml").write_text(block("snippet: rows.toml"))
    return folder


def python(cache: Path, code: str, **environment: str) -> Ran:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cache,
        env={**os.environ, "CUTE_KERNELS_CACHE": str(cache), "PATH": cuda_tools(), **environment},
    )
    assert done.returncode == 0, done.stderr
    return Ran(done.stdout, done.stderr, cache)


@pytest.fixture(scope="session")
def compiled(cache) -> Ran:
    """The first row of docs/extend.md."""
    return python(cache, block("snippet: first row"))


@pytest.fixture(scope="session")
def library(compiled) -> Path:
    (found,) = compiled.folder.glob("bf16_mine-*/kernel.so")
    return found


@pytest.fixture
def use_cache(compiled, monkeypatch) -> Path:
    """This process uses the folder, too; it adds no row."""
    monkeypatch.setenv("CUTE_KERNELS_CACHE", str(compiled.folder))
    return compiled.folder


def test_the_first_row_is_compiled_and_called(compiled):
    assert "compiling bf16_mine (1 of 1), about 70 s" in compiled.said
    assert "compiled bf16_mine in" in compiled.said


SECOND = f"""
import time
import cute_kernels

start = time.monotonic()
row = cute_kernels.TileConfig("forward", **{ROW!r})
cute_kernels.add_tile_config(row)
print(time.monotonic() - start)
assert cute_kernels.tile_configs("forward")[-1] == row.as_dict()
for again in (row, cute_kernels.TileConfig("forward", **{{**{ROW!r}, "tile_n": 80}})):
    try:
        cute_kernels.add_tile_config(again)
    except ValueError as error:
        print(error)
import torch
import glob
try:
    torch.ops.cute_kernels.load_plugin(glob.glob("bf16_mine-*/kernel.so")[0])
except RuntimeError as error:
    print(error)
"""


def test_the_second_process_compiles_nothing_and_no_name_is_taken_twice(compiled):
    ran = python(compiled.folder, SECOND)
    assert ran.said == ""
    seconds, *refusals = ran.out.splitlines()
    assert float(seconds) < 10
    taken = "name is 'bf16_mine', and there is a row of that name"
    assert refusals[:2] == [taken, taken]
    assert "kernel.so holds bf16_mine, and there is a kernel of that name already" in refusals[2]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_a_plugin_shows_its_entry_alone(library):
    """Two CUDA runtimes in a process, and two plug-ins, must not meet."""
    command = ["nm", "--dynamic", "--defined-only", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in text.splitlines()] == ["cute_kernels_plugin"]


def test_a_call_names_what_there_is():
    q = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match=r"tile_config is 'bf16_mine', must be None"):
        cute_kernels.flash_attn_func(q, q, q, tile_config="bf16_mine")


def test_the_automatic_choice_weighs_the_row(compiled):
    out = python(compiled.folder, block("snippet: choice")).out
    small, large = re.fullmatch(r"64 queries: \S+ -> (\S+)\n16k queries: (\S+)\n", out).groups()
    assert small == "bf16_mine"
    assert large != "bf16_mine"


def test_the_example_runs(compiled):
    """With the kernel of docs/extend.md, which is its row."""
    ran = python(compiled.folder, (ROOT / "examples" / "own_tile.py").read_text())
    assert ran.said == ""  # nothing is compiled
    assert "refused: forward row large: registers of a consumer thread" in ran.out
    assert re.search(r"^64 queries: \w+ -> bf16_mine$", ran.out, re.M)
    assert not re.search(r"^16384 queries: .* -> bf16_mine$", ran.out, re.M)
    assert ran.out.splitlines()[-1] == "passed"


def test_a_refused_row_shows_its_arithmetic(capsys):
    exec(block("snippet: refused row"), {})
    assert capsys.readouterr().out == block("output: refused row")


def test_the_machine_code_can_be_looked_at(use_cache, library, monkeypatch, capsys):
    monkeypatch.setenv("PATH", cuda_tools())
    tool = shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("needs cuobjdump: python -m pip install --group test")
    exec(block("snippet: machine code"), {})
    out = capsys.readouterr().out
    products, spilled = re.fullmatch(r"products: (\d+) spilled .*: (\d+)\n", out).groups()
    assert int(products) > 0
    assert int(spilled) == 0
    code = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True)
    assert set(re.findall(r"arch = (\w+)", code.stdout)) == {"sm_90a"}
    assert instructions(code.stdout, "UTMALDG")


def test_a_table_is_loaded_by_call_and_by_environment(compiled):
    listed = "\nprint([row['name'] for row in cute_kernels.tile_configs('forward')][-1])"
    by_call = python(compiled.folder, block("snippet: table"))
    assert (by_call.out, by_call.said) == ("['bf16_mine']\n", "")
    by_environment = python(
        compiled.folder, f"import cute_kernels{listed}", CUTE_KERNELS_TILE_CONFIGS="rows.toml"
    )
    assert (by_environment.out, by_environment.said) == ("bf16_mine\n", "")


def test_a_table_that_cannot_be_loaded_is_an_error_that_names_it(cache, tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(block("snippet: rows.toml").replace("tile_n = 64", "tile_n = 100"))
    code = "try:\n    import cute_kernels\nexcept ImportError as error:\n    print(error)"
    for table, reason in ((wrong, "tile_n = 100 must be"), ("none.toml", "No such file")):
        out = python(cache, code, CUTE_KERNELS_TILE_CONFIGS=str(table)).out
        assert f"CUTE_KERNELS_TILE_CONFIGS is '{table}', whose rows cannot be added" in out
        assert reason in out


def test_tables_are_compiled_ahead_of_time(use_cache, library, tmp_path, capsys):
    table = str(use_cache / "rows.toml")
    assert command_line.main(["compile", table, "-j", "2"]) == 0
    assert capsys.readouterr().out == f"{library}\n"
    shipped = tmp_path / "shipped" / library.parent.name
    shutil.copytree(library.parent, shipped)
    assert command_line.main(["compile", table, "--out", str(shipped.parent)]) == 0
    out, said = capsys.readouterr()
    assert (out, said) == (f"{shipped}/kernel.so\n", f"1 kernels in {shipped.parent}\n")
    assert command_line.main(["compile", "none.toml"]) == 1
    assert "none.toml" in capsys.readouterr().err


def test_info_says_what_there_is_and_what_is_wrong(use_cache, library, monkeypatch, capsys):
    assert command_line.main(["info"]) == 0
    whole = capsys.readouterr().out
    assert re.search(rf"cute_kernels  {re.escape(cute_kernels.__version__)} in ", whole)
    assert cute_kernels.tile_configs("forward")[0]["name"] in whole
    assert f"cache  {use_cache}, 1 kernels\n" in whole
    assert re.search(r"compiler  \S+nvcc with \S+ \(nvcc [\d.]+, CUTLASS [\d.]+\)", whole)
    assert re.search(r"plug-ins  ABI \d+, headers [0-9a-f]{16}\n", whole)
    if not torch.cuda.is_available() or no_hopper() is None:
        assert "wrong  nothing\n" in whole
    monkeypatch.setenv("CUTE_KERNELS_CACHE", "/dev/null/cache")
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert command_line.main(["info"]) == 0
    broken = capsys.readouterr().out
    assert "wrong  the cache /dev/null/cache cannot be written" in broken
    assert "/nowhere/nvcc does not run" in broken


PLUGIN = """
struct Plugin {
  int abi, problem_bytes, kernel_bytes;
  char const *headers, *pass;
  void const* kernel;
};
extern "C" Plugin const* cute_kernels_plugin() {
  static Plugin const plugin = {%s, 8, 8, "%s", "%s", nullptr};
  return &plugin;
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"abi": 99}, r"kernel\.so has plug-in ABI 99, this build \d+: compile it again"),
        ({"headers": "beef"}, r"headers of digest beef, this build has [0-9a-f]{16}: compile it"),
        ({"of_pass": "sideways"}, "holds a sideways kernel, and this build has none"),
        ({}, r"has structs of 8 and 8 bytes for a problem and a kernel, this build \d+ and \d+"),
        (None, r"is no kernel of cute_kernels: it has no cute_kernels_plugin"),
    ],
)
def test_a_plugin_of_another_build_is_refused_by_what_differs(tmp_path, changes, reason):
    abi, headers = torch.ops.cute_kernels.plugin_requirements()
    given = {"abi": abi, "headers": headers, "of_pass": "forward", **(changes or {})}
    source, library = tmp_path / "plugin.cpp", tmp_path / "kernel.so"
    source.write_text("" if changes is None else PLUGIN % tuple(given.values()))
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library], check=True)
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.cute_kernels.load_plugin(str(library))


def test_what_is_no_library_is_refused(tmp_path):
    (tmp_path / "kernel.so").write_text("library\n")
    with pytest.raises(RuntimeError, match=r"cannot load a kernel: .*kernel\.so"):
        torch.ops.cute_kernels.load_plugin(str(tmp_path / "kernel.so"))


HARNESS = """
#include <cstdio>
#include <stdexcept>
#include <dlfcn.h>
#include "cute_kernels/attention/plugin.hpp"
using namespace cute_kernels::attention;
int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::puts(dlerror()), 1;
  auto entry = reinterpret_cast<Plugin const* (*)()>(dlsym(library, "cute_kernels_plugin"));
  auto const& kernel = *static_cast<ForwardKernel const*>(entry()->kernel);
  static float memory[1 << 16];
  TensorView view{memory, 64, 64, 64};
  AttentionCall const call{{1, 64, 64, 1, 1, 64, 64}, mask_spec(false), 1.f};
  ForwardProblem problem{call, view, view, view, view, memory, nullptr, {0, 132}};
  try {
    kernel.launch(problem, nullptr);
  } catch (std::runtime_error const& error) {
    std::puts(error.what());
  }
}
"""


def test_a_refused_descriptor_is_an_exception_for_who_called_the_plugin(library, tmp_path):
    """Without a driver every descriptor is refused."""
    if no_hopper() is None:
        pytest.skip("needs a machine without an NVIDIA driver")
    program = compile_program(HARNESS, tmp_path)
    done = subprocess.run([program, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("the driver refuses a TMA descriptor (cuTensorMapEncodeTiled:")


RUN = f"""
import torch
import cute_kernels
from cute_kernels import flash_attn_func
from parity import check

cute_kernels.add_tile_config(cute_kernels.TileConfig("forward", **{ROW!r}))
q, k, v = torch.randn(3, 2, 333, 4, 64, device="cuda", dtype=torch.bfloat16)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):  # the first call: nothing that a capture forbids happens lazily
    captured = flash_attn_func(q, k, v, tile_config="bf16_mine")
graph.replay()
assert torch.equal(captured, flash_attn_func(q, k, v, tile_config="bf16_mine"))
for causal in (False, True):
    check(q, k, v, causal, tile_config="bf16_mine")
print("right")
"""


def test_the_kernel_runs(hopper, compiled):
    # The package, too, may come by the path.
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ran = python(compiled.folder, RUN, PYTHONPATH=path)
    assert ran.out == "right\n"


SHORT = f"""
import torch
import cute_kernels
from cute_kernels import flash_attn_func
from parity import check

row = {ROW!r} | {{"name": "bf16_short", "tile_m": 256}}
assert not cute_kernels.TileConfig("forward", **row).as_dict()["separate_output"]
cute_kernels.add_tile_config(cute_kernels.TileConfig("forward", **row))
for seqlen_q, seqlen_k in [(64, 64), (64, 1), (130, 64), (300, 7)]:
    q, k, v = (
        torch.randn(64, n, 32, 64, device="cuda", dtype=torch.bfloat16)
        for n in (seqlen_q, seqlen_k, seqlen_k)
    )
    for causal in (False, True):
        options = {{"causal": causal, "tile_config": "bf16_short"}}
        right = flash_attn_func(q, k, v, **options)
        for _ in range(50):
            assert torch.equal(flash_attn_func(q, k, v, **options), right)
        check(q[:1], k[:1], v[:1], causal, tile_config="bf16_short")
print("right")
"""


def test_warpgroups_without_rows_where_o_shares_memory_with_q(hopper, cache):
    """Tiles of many short heads, whose warps hardly anything but Q's barriers holds together."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ran = python(cache, SHORT, PYTHONPATH=path)
    assert ran.out == "right\n"


def test_the_snippets_of_a_tuned_set_run(hopper, tmp_path):
    """With the rows of the build alone: a candidate is a minute of nvcc."""
    code = block("snippet: tune")
    assert code.count("candidates=12") == 1
    path = os.pathsep.join(sys.path)
    head_dim = cute_kernels.tile_configs("forward")[0]["head_dim"]
    code = code.replace("candidates=12", "candidates=0").replace("128", str(head_dim))
    assert "fastest: " in python(tmp_path, code, PYTHONPATH=path).out
    (name,) = eval(python(tmp_path, block("snippet: use tuned"), PYTHONPATH=path).out)
    assert name in {row["name"] for row in cute_kernels.tile_configs("forward")}
    assert command_line.main(["plot", f"{tmp_path}/search.json", "--out", f"{tmp_path}/a.svg"]) == 0
