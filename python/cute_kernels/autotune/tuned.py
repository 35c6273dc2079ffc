"""What searches found: shown, recorded, and kept for other processes."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cute_kernels.compile.build import cache_folder, locked, say

FILE = "tuned.json"


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        kind: the calls: GPU, headers' digest, pass, dtype and sizes.
        name: of the fastest row, which the automatic choice takes from now on.
        automatic: of the row that it took before.
        samples: seconds of a call in each round, by row, the fastest by the median first.
        rows: the columns of those rows, by name.
        refused: how many rows of the search space cannot become a kernel, by reason.
        failed: why a candidate was not timed, by row: its compiler's error, or wrong results.
    """

    kind: dict[str, Any]
    name: str
    automatic: str
    samples: dict[str, list[float]]
    rows: dict[str, dict[str, Any]]
    refused: dict[str, int]
    failed: dict[str, str]

    @property
    def seconds(self) -> dict[str, float]:
        """Of a call, the median, by row, the fastest first."""
        return {name: statistics.median(samples) for name, samples in self.samples.items()}

    def table(self) -> str:
        """The rows that were timed, with their speed relative to the automatic choice's."""
        width = max(map(len, self.samples))
        lines = [f"{'row':{width}}  {'µs':>10}  {'speed':>6}"]
        of_automatic = self.seconds[self.automatic]
        for name, seconds in self.seconds.items():
            mark = "  <- automatic choice before" if name == self.automatic else ""
            speed = of_automatic / seconds
            lines.append(f"{name:{width}}  {1e6 * seconds:10.1f}  {speed:6.3f}{mark}")
        lines += [f"failed: {name}: {why.splitlines()[0]}" for name, why in self.failed.items()]
        lines += [f"refused: {count} rows for {why}" for why, count in self.refused.items()]
        return "\n".join([*lines, f"fastest: {self.name}"])


def write_record(path: str | os.PathLike[str], runs: Sequence[Tuned]) -> None:
    """All that the searches measured, as JSON, for `python -m cute_kernels plot`."""
    _replace(Path(path), {"runs": [asdict(run) for run in runs]})


def read_record(path: str | os.PathLike[str]) -> list[Tuned]:
    """The searches of a file. Raises ValueError if `write_record` did not write it."""
    try:
        return [Tuned(**run) for run in json.loads(Path(path).read_text("utf-8"))["runs"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)} is no record of tune: {error!r}") from error


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of the file: none where there is no file, or something else."""
    try:
        entries = json.loads(path.read_text("utf-8"))
        if all(e["kind"]["sizes"] and e["kind"]["pass"] and e["row"]["name"] for e in entries):
            return list(entries)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError):
        pass
    say(f"{path} is not what tune wrote, and is not used")
    return []


def remember(entry: dict[str, Any]) -> None:
    """Replaces the entry of its kind. The file is there whole, or as it was."""
    path = cache_folder() / FILE
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(path.with_name(f".{FILE}.lock"), FILE):
            _replace(path, [*(e for e in read(path) if e["kind"] != entry["kind"]), entry])
    except OSError as error:
        say(f"cannot write {path}, what was found is for this process alone: {error}")


def _replace(path: Path, content: Any) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
