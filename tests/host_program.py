"""C++ that includes headers without CUDA in them, compiled for this machine and asked."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from configure import PATH, ROOT

CXX = shutil.which("c++", path=PATH)
needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
CHECKED = ("-fsanitize=undefined,address", "-fno-sanitize-recover=all")


def host_program(folder: Path, source: str, *options: str) -> Callable[..., list[list[float]]]:
    """What the program answers, lines of numbers, to cases, one a line on its standard input."""
    (folder / "main.cpp").write_text(source)
    command = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", *options, "-I", ROOT]
    subprocess.run([*command, "-o", "main", "main.cpp"], cwd=folder, check=True)

    def run(cases, *arguments: str, number: type = int) -> list[list[float]]:
        text = "\n".join(" ".join(map(str, case)) for case in cases)
        done = subprocess.run(
            [folder / "main", *arguments], input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [list(map(number, line.split())) for line in done.stdout.splitlines()]

    return run
