"""Runs of CMake on the project's sources, with the tools of this Python's environment first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Activated or not
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def missing_tool() -> str | None:
    """What CMake would lack here, or None."""
    return next((t for t in ("cmake", "ninja", "c++") if shutil.which(t, path=PATH) is None), None)


def configure(build: Path, **definitions) -> subprocess.CompletedProcess:
    """CMake's configure run into the folder `build` with these definitions, output as text."""
    definitions = {"Python_EXECUTABLE": sys.executable, **definitions}
    return subprocess.run(
        [shutil.which("cmake", path=PATH), "-G", "Ninja", "-S", ROOT, "-B", build]
        + [f"-D{name}={value}" for name, value in definitions.items()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": PATH},
    )


def failing_configure(build: Path, **definitions) -> str:
    """What CMake says on stderr when it refuses to configure the project with these definitions."""
    if tool := missing_tool():
        pytest.skip(f"needs {tool}")
    done = configure(build, **definitions)
    assert done.returncode != 0, done.stdout
    return done.stderr
