"""The compiler of users' rows: an nvcc, a host compiler and the headers, found where CMake finds
them (cmake/Nvcc.cmake, cmake/Cutlass.cmake)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .headers import TENSOR_MAP

FLOOR = (12, 4)  # the release of CUDA
INSTALL = "pip install cute-kernels[compile]"
OPTIONS = tuple(
    line
    for line in (Path(__file__).parent / "nvcc_options.txt").read_text("utf-8").splitlines()
    if line.startswith("-")
)
# What CMake says in words of its own: a shared library for Hopper that shows its entry alone.
PLUGIN_OPTIONS = (
    "-shared",
    "-std=c++17",
    "--generate-code=arch=compute_90a,code=sm_90a",
    "-cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden",
    "-Xlinker=--exclude-libs,ALL",
)


class CompilerError(RuntimeError):
    """There is no compiler that will do, or it failed; the message says what to do or why."""


def package_folders(module: str) -> list[Path]:
    """Where a package lies, without importing it; a namespace package has several folders."""
    spec = importlib.util.find_spec(module)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]


def wheel_roots() -> list[Path]:
    """The roots of NVIDIA's CUDA 13 wheels: several, if an environment sees the system's."""
    return [folder / "cu13" for folder in package_folders("nvidia")]


def candidates() -> list[Path]:
    """What may be an nvcc, best first."""
    if named := os.environ.get("CUDACXX"):
        return [Path(shutil.which(named) or named)]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = [
        *(f"{home}/bin" for home in homes),
        *os.environ.get("PATH", os.defpath).split(os.pathsep),
        "/usr/local/cuda/bin",
    ]
    toolkit = shutil.which("nvcc", path=os.pathsep.join(path))
    found = [Path(toolkit)] if toolkit else []
    return found + [nvcc for root in wheel_roots() if (nvcc := root / "bin" / "nvcc").exists()]


def version_of(nvcc: Path) -> str:
    """Such as 13.0.88, or "" if it does not run."""
    try:
        done = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"release (\d+\.\d+)(?:, V([\d.]+))?", done.stdout)
    return (found[2] or found[1]) if found and done.returncode == 0 else ""


def find_nvcc() -> tuple[Path, str]:
    """An nvcc and its version. Raises CompilerError if there is none of FLOOR or newer."""
    refused = []
    for nvcc in candidates():
        version = version_of(nvcc)
        if not version:
            refused.append(f"{nvcc} does not run, or is no nvcc")
        elif tuple(map(int, version.split(".")[:2])) < FLOOR:
            refused.append(f"{nvcc} is of CUDA {version}: too old")
        else:
            return nvcc, version
    floor = ".".join(map(str, FLOOR))
    why = "; ".join(refused) or (
        "nvcc is neither in CUDA_HOME, on PATH, in /usr/local/cuda nor among PyPI's wheels"
    )
    raise CompilerError(
        f"no CUDA compiler that will do: {why}. Kernels need nvcc of CUDA {floor} or newer: "
        f"`{INSTALL}` brings it, or install a CUDA toolkit, or name one with CUDACXX=/path/to/nvcc"
    )


def find_host_compiler() -> Path:
    named = os.environ.get("CUDAHOSTCXX")
    for name in [named] if named else ["g++", "c++", "clang++"]:
        if found := shutil.which(name):
            return Path(found)
    missing = f"CUDAHOSTCXX is {named!r}, which does not run" if named else "there is no g++"
    raise CompilerError(
        f"no C++ compiler: {missing}. nvcc needs one of C++17: install g++ (Debian, Ubuntu: "
        "`apt-get install g++`; Fedora, RHEL: `dnf install gcc-c++`; conda: `gxx`), or name one "
        "with CUDAHOSTCXX=/path/to/g++"
    )


def find_cutlass() -> Path:
    for folder in package_folders("cutlass_library"):
        include = folder / "source" / "include"
        if (include / "cute" / "tensor.hpp").exists():
            return include
    raise CompilerError(f"CUTLASS's headers are missing: `{INSTALL}` brings them (nvidia-cutlass)")


@dataclass(frozen=True)
class Toolchain:
    """What compiles plug-ins. `version` names all of it that decides about the machine code."""

    nvcc: Path
    host: Path
    cutlass: Path
    version: str

    @classmethod
    def find(cls) -> Toolchain:
        """Raises CompilerError that names the package to install."""
        nvcc, version = find_nvcc()
        host, cutlass = find_host_compiler(), find_cutlass()
        macros = (cutlass / "cutlass" / "version.h").read_text("utf-8")
        release = ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", macros))
        return cls(nvcc, host, cutlass, f"nvcc {version}, CUTLASS {release}")

    def command(self, include: Path, source: Path, out: Path) -> list[str]:
        """Compiles `source`, a plug-in, into the shared library `out`."""
        found = [f"-I{include}", "-isystem", str(self.cutlass)]
        roots = wheel_roots()
        if any(root in self.nvcc.parents for root in roots):  # a toolkit finds its own
            for root in roots:
                found += [f"-I{root}/include", "-isystem", f"{root}/include/cccl", f"-L{root}/lib"]
        sources = [source, include / TENSOR_MAP]
        options = [*PLUGIN_OPTIONS, *OPTIONS, f"-ccbin={self.host}"]
        return [str(self.nvcc), *options, *found, *map(str, sources), "-o", str(out)]
