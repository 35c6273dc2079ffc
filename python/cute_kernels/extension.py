"""The compiled part of the package: importing it registers the operator and its CUDA kernels."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch  # before the extension, whose symbols come from libtorch

NAME = "cute_kernels._C"


def _load() -> Path:
    if importlib.util.find_spec(NAME) is None:
        raise ImportError(
            f"{NAME} is not built: this is the package's source folder or a broken installation. "
            "Build and install it from the repository's root with "
            "`python -m pip install -v --no-build-isolation .` (see README.md)."
        )
    try:
        file = importlib.import_module(NAME).__file__
    except ImportError as error:
        raise ImportError(
            f"{NAME} does not load under torch {torch.__version__}; it needs torch 2.10 or newer: "
            f"{error}"
        ) from error
    assert file is not None
    return Path(file).parent


FOLDER = _load()  # what is installed beside the extension: the tile table and the C++ headers
