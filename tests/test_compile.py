"""Rows of the user's own up to the shared library: which compiler, the cache. The compiler is a
stand-in; test_extend.py has the real one. No GPU."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from compilers import Compiler, find_toolchain
from configure import ROOT, configure, missing_tool

import cute_kernels
from cute_kernels import TileConfig, plugins
from cute_kernels.compile import build, nvcc
from cute_kernels.compile.passes import PASSES

GOOD = {"name": "mine", "dtype": "bf16", "head_dim": 64, "tile_m": 128, "tile_n": 128}


@pytest.fixture
def compiler(tmp_path) -> Compiler:
    return Compiler(tmp_path)


def test_a_row_has_the_tables_defaults():
    row = TileConfig("forward", **GOOD)
    assert row.as_dict().items() >= {**GOOD, "pass": "forward", "stages": 2, "mask": "any"}.items()
    assert row.name == "mine"
    assert row.as_dict().keys() == cute_kernels.tile_configs("forward")[0].keys()
    assert eval(repr(row)) == row
    assert hash(row) == hash(TileConfig("forward", **GOOD))
    assert row != TileConfig("forward", **{**GOOD, "tile_n": 64})
    with pytest.raises(AttributeError):
        row.name = "another"


@pytest.mark.parametrize("of_pass", PASSES)
def test_every_pass_has_rows(of_pass):
    dtype = next(iter(PASSES[of_pass].dtypes))
    fields = {**GOOD, "dtype": dtype}
    if of_pass == "latent":  # whose tiles have one height
        del fields["tile_m"]
        fields |= {"head_dim_v": 512, "tile_n": 64}
    if of_pass == "decode_fp8":  # of many rows, whose blocks are converted on their way
        fields["staged"] = 1
    row = TileConfig(of_pass, **fields)
    assert (row.as_dict()["pass"], row.as_dict()["dtype"]) == (of_pass, dtype)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 80}, "forward row mine: head_dim = 80 must be a multiple of 32"),
        ({"tile_n": 100}, "tile_n = 100 must be a multiple of 16"),
        ({"tile_m": None}, "tile_m is None, expected int"),
        ({"stages": 9}, r"shared memory: 147456 K \+ 147456 V .* > 232448 bytes"),
        ({"tile_n": 256, "tile_m": 192}, r"128 scores \+ .* > 160 with 3 consumer warpgroups"),
        ({"stagse": 2}, "unknown field stagse; known are .*stages"),
        ({"dtype": "fp8"}, "dtype 'fp8' is none of bf16, fp16"),
        ({"name": "Mine"}, "name 'Mine' must be lower case"),
    ],
)
def test_a_row_that_makes_no_kernel_is_refused_with_the_reason(changes, reason):
    with pytest.raises(ValueError, match=reason):
        TileConfig("forward", **{**GOOD, **changes})


def test_arguments_of_a_row_are_named():
    with pytest.raises(ValueError, match="of_pass is 'sideways', must be one of forward, backward"):
        TileConfig("sideways", **GOOD)
    with pytest.raises(TypeError, match="dtype is 16, must be a str"):
        TileConfig("forward", **{**GOOD, "dtype": 16})
    with pytest.raises(TypeError, match=r"config is a dict, must be a cute_kernels\.TileConfig"):
        cute_kernels.add_tile_config(GOOD)
    with pytest.raises(TypeError, match="config is a str"):
        cute_kernels.compile_tile_config("mine")


def test_the_second_build_compiles_nothing(compiler):
    (library,), said = compiler.run()
    assert "compiling mine (1 of 1), about 70 s" in said
    assert "compiled mine in 0 s" in said
    assert library.read_text() == "library\n"
    assert library.is_relative_to(compiler.cache)
    assert stat.S_IMODE(compiler.cache.stat().st_mode) == 0o700
    assert compiler.run() == ([library], "")
    assert compiler.calls == 1
    assert {path.name for path in library.parent.iterdir()} == {
        "kernel.cu",
        "kernel.so",
        "kernel.sha256",
    }


def test_only_what_is_missing_is_compiled(compiler):
    compiler.run("b")
    libraries, said = compiler.run("a", "b", "c", SECONDS="0.1")
    assert [library.parent.name[0] for library in libraries] == ["a", "b", "c"]
    assert "compiling a (1 of 2)" in said
    assert "compiling c (2 of 2)" in said
    assert compiler.calls == 3


def test_eight_processes_at_once_compile_once(compiler):
    processes = [compiler.start(SECONDS="1") for _ in range(8)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert len({out for out, _ in said}) == 1
    assert compiler.calls == 1
    assert sum("compiling mine" in err for _, err in said) == 1


@pytest.mark.parametrize("damage", ["changed", "cut", "foreign", "no digest"])
def test_a_library_that_was_not_compiled_there_is_compiled_again(compiler, damage):
    (library,), _ = compiler.run()
    if damage == "no digest":
        (library.parent / "kernel.sha256").unlink()
    elif damage == "foreign":
        (library.parent / "kernel.sha256").write_bytes(b"\xff")
    else:
        library.write_text({"changed": "Library\n", "cut": "lib"}[damage])
    assert compiler.run()[0] == [library]
    assert library.read_text() == "library\n"
    assert compiler.calls == 2


def test_another_compiler_has_entries_of_its_own(compiler):
    (first,), _ = compiler.run()
    (second,), _ = compiler.run(RELEASE="13.1")
    assert first != second
    assert compiler.run() == ([first], "")
    assert compiler.calls == 2


@pytest.fixture
def other_headers(tmp_path) -> Path:
    """Those of another version."""
    include = tmp_path / "include"
    shutil.copytree(cute_kernels.get_include(), include)
    with open(include / "cute_kernels" / "attention" / "problem.hpp", "a") as header:
        header.write("// changed\n")
    return include


def test_another_version_of_the_package_has_entries_of_its_own(compiler, other_headers):
    (first,), _ = compiler.run()
    compiler.include = str(other_headers)
    (second,), _ = compiler.run()
    assert first != second
    assert first.exists()
    assert compiler.calls == 2


def test_two_versions_at_once_do_not_meet(compiler, other_headers):
    processes = [compiler.start(SECONDS="0.5")]
    compiler.include = str(other_headers)
    processes.append(compiler.start(SECONDS="0.5"))
    libraries = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert len(set(libraries)) == 2
    assert [Path(library).read_text() for library in libraries] == ["library\n"] * 2
    assert compiler.calls == 2


def test_headers_that_are_not_the_extensions_compile_nothing(other_headers, monkeypatch):
    monkeypatch.setattr(plugins, "get_include", lambda: str(other_headers))
    with pytest.raises(RuntimeError, match=f"the headers in {other_headers} have digest .*again"):
        cute_kernels.compile_tile_config(TileConfig("forward", **GOOD))


def test_without_a_compiler_the_cache_is_enough(compiler):
    (library,), _ = compiler.run()
    assert compiler.run(CUDACXX="/nowhere/nvcc") == ([library], "")
    libraries, said = compiler.run("other", CUDACXX="/nowhere/nvcc")
    assert libraries == []
    assert "CompilerError: no CUDA compiler that will do: /nowhere/nvcc does not run" in said
    assert "pip install cute-kernels[compile]" in said


def test_what_cannot_be_written_serves_every_compiler(compiler, monkeypatch, tmp_path):
    """Such as a folder that was shipped."""
    (library,), _ = compiler.run()
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in {**compiler.environment, "RELEASE": "13.1"}.items():
        monkeypatch.setenv(name, value)
    row, include = TileConfig("forward", **GOOD).as_dict(), Path(cute_kernels.get_include())
    recipe = build.Recipe(row, include, compiler.cache, nvcc.Toolchain.find())
    assert recipe.find() is None
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert recipe.find() == library


def test_an_old_nvcc_is_refused(compiler):
    _, said = compiler.run(RELEASE="12.3")
    assert "is of CUDA 12.3.88: too old" in said
    assert "CUDA 12.4 or newer" in said


def test_a_missing_host_compiler_names_the_package(compiler):
    _, said = compiler.run(CUDAHOSTCXX="", PATH="/nowhere")
    assert "CompilerError: no C++ compiler" in said
    assert "apt-get install g++" in said


def test_what_nvcc_says_is_in_the_error_and_the_next_call_works(compiler):
    libraries, said = compiler.run(REFUSAL="kernel.cu(5): error: static assertion failed")
    assert libraries == []
    assert "CompilerError: nvcc does not compile mine (status 1)" in said
    assert "static assertion failed" in said
    assert not [path for path in compiler.cache.iterdir() if path.is_dir()]
    assert len(compiler.run()[0]) == 1


@pytest.fixture
def disk(tmp_path):
    """A disk of 16 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("used", "error"), [(16, "CacheError"), (12, "CompilerError")])
def test_a_full_disk_is_named_and_the_next_call_works(compiler, disk, used, error):
    """Full before the source is written, and when the library is."""
    cache = {"CUTE_KERNELS_CACHE": str(disk / "cache")}
    (disk / "other").write_bytes(bytes(used << 10))
    libraries, said = compiler.run(**cache)
    assert libraries == []
    assert f"\n{error}: " in f"\n{said}"
    assert "No space left on device" in said
    (disk / "other").unlink()
    (library,), _ = compiler.run(**cache)
    assert library.read_text() == "library\n"


def start_and_wait_for_nvcc(compiler):
    process = compiler.start(SECONDS="60")
    deadline = time.monotonic() + 30
    while compiler.calls == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_build_that_was_killed_leaves_nothing_in_the_way(compiler):
    kill(start_and_wait_for_nvcc(compiler))
    assert [path for path in compiler.cache.iterdir() if path.is_dir()], "it was not in a build"
    (library,), _ = compiler.run()
    assert [path for path in compiler.cache.iterdir() if path.is_dir()] == [library.parent]


def test_who_waits_for_a_build_that_is_killed_takes_over(compiler):
    first = start_and_wait_for_nvcc(compiler)
    second = compiler.start()
    assert "waiting for another process, which compiles mine" in second.stderr.readline()
    kill(first)
    out, said = second.communicate(timeout=60)
    assert "compiling mine (1 of 1)" in said
    assert Path(out.strip()).read_text() == "library\n"
    assert compiler.calls == 2


def test_a_cache_that_cannot_be_written_is_named(compiler, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in compiler.environment.items():
        monkeypatch.setenv(name, value)
    row, include = TileConfig("forward", **GOOD).as_dict(), Path(cute_kernels.get_include())
    recipe = build.Recipe(row, include, compiler.cache, nvcc.Toolchain.find())
    compiler.cache.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # who may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(build.CacheError, match=f"{compiler.cache}: .*denied") as error:
            recipe.make("(1 of 1)")
    finally:
        os.seteuid(user)
    assert "CUTE_KERNELS_CACHE" in str(error.value)
    compiler.cache.chmod(0o700)
    assert recipe.make("(1 of 1)").read_text() == "library\n"


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("CUTE_KERNELS_CACHE", "/some/where")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/user")
    assert build.cache_folder() == Path("/some/where")
    monkeypatch.delenv("CUTE_KERNELS_CACHE")
    assert build.cache_folder() == Path("/xdg/cute_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path("/home/user/.cache/cute_kernels")


def test_compilers_are_looked_for_where_cmake_looks(monkeypatch, tmp_path):
    for name in ("home", "on_path", "wheel/bin"):
        folder = tmp_path / name / ("bin" if name == "home" else "")
        folder.mkdir(parents=True)
        (folder / "nvcc").write_text("#!/bin/sh\n")
        (folder / "nvcc").chmod(0o755)
    monkeypatch.setattr(nvcc, "wheel_roots", lambda: [tmp_path / "wheel"])
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDACXX", "/named/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "on_path"))
    wheel = tmp_path / "wheel" / "bin" / "nvcc"
    assert nvcc.candidates() == [Path("/named/nvcc")]
    monkeypatch.delenv("CUDACXX")
    assert nvcc.candidates() == [tmp_path / "home" / "bin" / "nvcc", wheel]
    monkeypatch.delenv("CUDA_HOME")
    assert nvcc.candidates() == [tmp_path / "on_path" / "nvcc", wheel]


def test_cmake_and_the_package_ask_for_the_same_nvcc():
    text = (ROOT / "cmake" / "Nvcc.cmake").read_text()
    (floor,) = re.findall(r"CUTE_KERNELS_CUDA_FLOOR ([\d.]+)\)", text)
    assert floor == ".".join(map(str, nvcc.FLOOR))


def test_cmake_compiles_with_the_same_options(tmp_path):
    find_toolchain()
    if tool := missing_tool():
        pytest.skip(f"needs {tool}")
    done = configure(tmp_path, CMAKE_EXPORT_COMPILE_COMMANDS="ON", CUTE_KERNELS_DTYPES="bf16")
    assert done.returncode == 0, done.stderr
    commands = [
        set(shlex.split(entry["command"]))
        for entry in json.loads((tmp_path / "compile_commands.json").read_text())
        if Path(entry["file"]).name.startswith("bf16_")
    ]
    assert commands
    for command in commands:
        assert set(nvcc.OPTIONS) <= command
        assert "-std=c++17" in command
        assert any("arch=compute_90a,code=[sm_90a]" in part for part in command)
    assert {"-std=c++17", "--generate-code=arch=compute_90a,code=sm_90a"} < set(nvcc.PLUGIN_OPTIONS)


def test_the_extra_brings_what_a_build_takes():
    text = (ROOT / "pyproject.toml").read_text()
    lists = [
        set(re.findall(r'"(nvidia-[^"]+)"', part))
        for part in re.findall(r"^(?:compile|build|requires) = \[$(.*?)^\]", text, re.M | re.S)
    ]
    assert len(lists) == 3
    assert lists[0] == lists[1] == lists[2]
    assert len(lists[0]) == 6
