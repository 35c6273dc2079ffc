"""Distributions that are not installed, for `importlib.metadata`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any


class _StandIn(Distribution):
    def __init__(self, name: str, release: str, modules: list[str]) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n",
            "top_level.txt": "\n".join(modules),
        }

    def read_text(self, filename: str | os.PathLike[str]) -> str | None:
        return self._texts.get(os.fspath(filename))

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(__file__).parent / path


class Finder(MetaPathFinder):
    """Of no modules: only of distributions, {name: (release, top-level modules)}."""

    def __init__(self, distributions: dict[str, tuple[str, list[str]]]) -> None:
        self._distributions = distributions

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        wanted = getattr(context, "name", None)
        for name, of_name in self._distributions.items():
            if wanted is None or _normal(wanted) == _normal(name):
                yield _StandIn(name, *of_name)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
