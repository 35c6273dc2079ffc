"""Programs in C++, stand-ins for nvcc, and processes that compile without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cute_kernels
from cute_kernels.compile.nvcc import CompilerError, Toolchain

PACKAGE = Path(cute_kernels.__file__).parent

# Says its version; else counts the call in $LOG, sleeps for $SECONDS and writes what it "compiled".
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then
  echo "Cuda compilation tools, release $RELEASE, V$RELEASE.88"
  exit 0
fi
echo call >> "$LOG"
sleep $SECONDS
if [ -n "$REFUSAL" ]; then
  echo "$REFUSAL" >&2
  exit 1
fi
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then echo library | cat > "$2" || exit 1; fi
  shift
done
"""

BUILD = """
import sys
from pathlib import Path
from compile.build import CacheError, build
from compile.config import TileConfig
from compile.nvcc import CompilerError

assert "torch" not in sys.modules
rows = [
    TileConfig("forward", name=name, dtype="bf16", head_dim=64, tile_m=128, tile_n=128).as_dict()
    for name in sys.argv[2:]
]
try:
    for library in build(rows, Path(sys.argv[1])):
        print(library)
except (CacheError, CompilerError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def find_toolchain() -> Toolchain:
    """The real one; the test is skipped where there is none."""
    try:
        return Toolchain.find()
    except CompilerError as error:
        pytest.skip(f"needs a compiler: {error}")


def compile_program(text: str, folder: Path) -> Path:
    """A program for the CPU, from C++ that includes headers of the package."""
    source, program = folder / "main.cpp", folder / "main"
    source.write_text(text)
    command = find_toolchain().command(Path(cute_kernels.get_include()), source, program)
    # It is no plug-in.
    command = [part for part in command if part != "-shared" and not part.endswith("_map.cpp")]
    subprocess.run(command, check=True)
    return program


class Compiler:
    """A compiler that takes no time, and the cache that it fills."""

    def __init__(self, folder: Path) -> None:
        self.log, self.cache = folder / "log", folder / "cache"
        self.include = cute_kernels.get_include()
        self.log.touch()
        include = folder / "cutlass_library" / "source" / "include"
        for file in ("cute/tensor.hpp", "cutlass/version.h", "../../__init__.py"):
            (include / file).parent.mkdir(parents=True, exist_ok=True)
            (include / file).touch()
        nvcc = folder / "nvcc"
        nvcc.write_text(NVCC)
        nvcc.chmod(0o755)
        self.environment = {
            "CUDACXX": str(nvcc),
            "CUDAHOSTCXX": "/bin/true",
            "CUTE_KERNELS_CACHE": str(self.cache),
            "PYTHONPATH": os.pathsep.join([str(folder), str(PACKAGE)]),
            "LOG": str(self.log),
            "RELEASE": "13.0",
            "SECONDS": "0",
            "REFUSAL": "",
        }

    @property
    def calls(self) -> int:
        return len(self.log.read_text().splitlines())

    def start(self, *names: str, **environment: str) -> subprocess.Popen:
        """A process that builds rows of these names and prints the libraries."""
        return subprocess.Popen(
            [sys.executable, "-c", BUILD, self.include, *(names or ["mine"])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment, **environment},
            start_new_session=True,
        )

    def run(self, *names: str, **environment: str) -> tuple[list[Path], str]:
        """The libraries, and what was said on stderr."""
        process = self.start(*names, **environment)
        out, said = process.communicate(timeout=60)
        return [Path(line) for line in out.splitlines()], said
