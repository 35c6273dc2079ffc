"""Runs of CMake that have to fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def failing_configure(build: Path, **definitions) -> str:
    """What CMake says on stderr when it refuses to configure the project with these definitions."""
    # Those of this Python's environment first, activated or not
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"needs {tool}")
    definitions = {"Python_EXECUTABLE": sys.executable, **definitions}
    done = subprocess.run(
        [shutil.which("cmake", path=path), "-G", "Ninja", "-S", ROOT, "-B", build]
        + [f"-D{name}={value}" for name, value in definitions.items()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode != 0, done.stdout
    return done.stderr
