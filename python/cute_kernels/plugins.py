"""Rows of the user's own: compiled on the user's machine, loaded, and from then on chosen like the
build's."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import cute_kernels.extension  # noqa: F401  defines the operators
from cute_kernels.compile.build import build, build_what_compiles
from cute_kernels.compile.config import TileConfig
from cute_kernels.compile.headers import digest
from cute_kernels.compile.nvcc import CompilerError
from cute_kernels.compile.table import TableError, read_table
from cute_kernels.tiles import ROWS, add_row, get_include

VARIABLE = "CUTE_KERNELS_TILE_CONFIGS"

_adding = threading.Lock()


def add_tile_config(config: TileConfig) -> None:
    """Adds a kernel to this process: ``tile_config=`` takes its name, `tile_configs` lists it, and
    the automatic choice weighs it from the next call on.

    What is not in the cache is compiled first, which takes a minute or more; stderr says so. The
    cache is the folder CUTE_KERNELS_CACHE, else ``cute_kernels`` in XDG_CACHE_HOME or
    ``~/.cache``. The compiler is nvcc of CUDA 12.4 or newer, from CUDACXX, CUDA_HOME, PATH,
    /usr/local/cuda or PyPI (``pip install cute-kernels[compile]``), with a C++ compiler. No GPU is
    needed.

    Of forward rows the automatic choice takes the one with the shortest estimated time, which the
    row's ``speed`` and ``overhead`` decide; of backward and FP8 rows of the smallest head dim that
    fits, the last one added.

    Args:
        config: its name must be new.

    Raises:
        TypeError: config is no TileConfig.
        ValueError: there is a row of that name.
        RuntimeError: no compiler, an error of the compiler, a cache that cannot be written, a pass
            that this build does not have, a library that was compiled for another build.
    """
    _check_config(config)
    add_rows([config.as_dict()])


def load_tile_configs(path: str | os.PathLike[str], *, jobs: int | None = None) -> list[str]:
    """Adds all rows of a table, as `add_tile_config` adds one; those that are not in the cache are
    compiled in parallel.

    Args:
        path: TOML, of the form of cute_kernels/attention/tile_configs.toml. A kernel's name is
            "<dtype>_<name>".
        jobs: how many kernels to compile at a time; by default as many as cores and memory allow.

    Returns:
        The names of the kernels.

    Raises:
        OSError: the file cannot be read.
        ValueError: a row cannot become a kernel, with the arithmetic; a name is taken; jobs is
            not above 0.
        RuntimeError: as `add_tile_config`.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}, must be at least 1, or None")
    rows = read_rows(path)
    add_rows(rows, jobs)
    return [row["name"] for row in rows]


def compile_tile_config(config: TileConfig, folder: str | os.PathLike[str] | None = None) -> Path:
    """Compiles a kernel without adding it, unless the cache has it.

    Args:
        config: the row.
        folder: the cache, instead of the user's. Another machine with the same build takes its
            kernels from a copy, which CUTE_KERNELS_CACHE names, also without a compiler.

    Returns:
        The shared library.

    Raises:
        TypeError, RuntimeError: as `add_tile_config`.
    """
    _check_config(config)
    (library,) = compile_rows([config.as_dict()], folder)
    return library


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    try:
        return read_table(Path(path).read_text("utf-8"))
    except TableError as error:
        raise TableError(f"{os.fspath(path)}: {error}") from None


def wrong_headers() -> str | None:
    """What is wrong with the installed headers: plug-ins of others than the extension's own would
    be refused."""
    include = Path(get_include())
    _, of_extension = torch.ops.cute_kernels.plugin_requirements()
    if (found := digest(include)) == of_extension:
        return None
    return (
        f"the headers in {include} have digest {found}, but this build was compiled from those of "
        f"{of_extension}: no row can be added; install cute-kernels again"
    )


def compile_rows(
    rows: Sequence[dict[str, Any]],
    folder: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
) -> list[Path]:
    return build(rows, right_headers(), None if folder is None else Path(folder), jobs)


def compile_candidates(
    rows: Sequence[dict[str, Any]], jobs: int | None = None
) -> tuple[dict[str, Path], dict[str, CompilerError]]:
    """Libraries and errors by name: a candidate that does not compile stops no other."""
    return build_what_compiles(rows, right_headers(), None, jobs)


def right_headers() -> Path:
    """The folder of the installed headers. Raises RuntimeError if they are not the build's."""
    if problem := wrong_headers():
        raise RuntimeError(problem)
    return Path(get_include())


def load_named_by_environment() -> None:
    """Adds the rows of the table that CUTE_KERNELS_TILE_CONFIGS names, if it does."""
    if not (path := os.environ.get(VARIABLE)):
        return
    try:
        load_tile_configs(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ImportError(f"{VARIABLE} is {path!r}, whose rows cannot be added: {error}") from error


def _check_config(config: object) -> None:
    if not isinstance(config, TileConfig):
        raise TypeError(f"config is a {type(config).__name__}, must be a cute_kernels.TileConfig")


def add_rows(rows: Sequence[dict[str, Any]], jobs: int | None = None) -> None:
    """Adds kernels, of which none may be there yet."""
    with _adding:
        for row in rows:
            if any(row["name"] in of_pass for of_pass in ROWS.values()):
                raise ValueError(f"name is {row['name']!r}, and there is a row of that name")
            if not ROWS[row["pass"]]:
                raise RuntimeError(
                    f"{row['name']} is a {row['pass']} row, and this build has no such kernels"
                )
        for row, library in zip(rows, compile_rows(rows, jobs=jobs), strict=True):
            _load(row, library)


def _load(row: dict[str, Any], library: Path) -> None:
    torch.ops.cute_kernels.load_plugin(str(library))
    add_row(row)


def load_new(rows: Iterable[dict[str, Any]], libraries: Mapping[str, Path]) -> None:
    """Adds those of the rows that have a library and are not there yet."""
    with _adding:
        for row in rows:
            if row["name"] in libraries and row["name"] not in ROWS[row["pass"]]:
                _load(row, libraries[row["name"]])
