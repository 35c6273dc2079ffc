"""What every benchmark script shares: options, the GPU it needs, its JSON file, progress."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.cells import DTYPES, MASKS, NORMAL, PAPER_HEAD_DIMS, PAPER_SEQLENS, Cell
from bench.distributions import ALL, DISTRIBUTIONS

NO_GPU = 2
SCHEMA = 1


def parser(description: str, name: str, replays: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have; `replays`: and those of timed graphs."""
    result = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    result.add_argument("--dtype", choices=DTYPES, default="bf16")
    if replays:
        result.add_argument(
            "--rounds", type=int, default=20, help="timed replays of each candidate in each cell"
        )
        result.add_argument(
            "--target-ms", type=float, default=4.0, help="GPU time of one replayed graph"
        )
    result.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder for the JSON file"
    )
    result.add_argument(
        "--commit", default=os.environ.get("CUTE_KERNELS_COMMIT"), help="where git cannot tell it"
    )
    return result


def add_grid_options(to: argparse.ArgumentParser) -> None:
    to.add_argument("--head-dims", type=int, nargs="+", default=list(PAPER_HEAD_DIMS), metavar="D")
    to.add_argument("--seqlens", type=int, nargs="+", default=list(PAPER_SEQLENS), metavar="S")
    to.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))


def add_data_option(to: argparse.ArgumentParser) -> None:
    meanings = "; ".join(f"{name}: {data.meaning}" for name, data in DISTRIBUTIONS.items())
    to.epilog = f"Data. {meanings}."
    to.add_argument(
        "--data",
        nargs="+",
        choices=[*DISTRIBUTIONS, ALL],
        default=[NORMAL],
        metavar="NAME",
        help=f"what the numbers are like: {', '.join(DISTRIBUTIONS)}, or {ALL} (see below)",
    )


def add_only_option(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--only", default="", metavar="TEXT", help="cells whose name contains it; default: all"
    )


def require_gpu() -> None:
    """Leave with a clear message and code 2 where nothing can be measured."""
    try:
        import torch
    except ImportError:
        _leave("PyTorch is not installed")
    if not torch.cuda.is_available():
        _leave("PyTorch sees no CUDA GPU; benchmarks need a Hopper GPU (compute capability 9.0)")
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        name = torch.cuda.get_device_name()
        _leave(
            f"{name} has compute capability {capability[0]}.{capability[1]}, "
            "but the kernels need 9.0 (Hopper)"
        )


def _leave(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr)
    raise SystemExit(NO_GPU)


def say(message: str) -> None:
    """One line of progress."""
    print(message, file=sys.stderr, flush=True)


class Record:
    """The JSON file of one run, saved after every cell: a run cut short leaves what it has."""

    def __init__(self, kind: str, path: Path, arguments: argparse.Namespace):
        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "command": shlex.join(["python", "-m", f"bench.{kind}", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": _commit(arguments.commit),
            "machine": _machine(),
            "settings": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in vars(arguments).items()
            },
        }

    def add(self, cell: Cell, results: dict[str, Any]) -> dict[str, Any]:
        """Takes a cell's results, and saves; the entry that it makes of them."""
        entry = {**cell.as_dict(), "results": results}
        self.data["cells"].append(entry)
        self.save()
        return entry

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        partial.replace(self.path)


def _commit(given: str | None) -> str | None:
    if given:
        return given
    root = Path(__file__).resolve().parent.parent
    try:
        head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
        changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def query_gpu() -> dict[str, str]:
    """Clocks, power and driver as nvidia-smi reads them (nothing is set); empty without it."""
    import torch

    fields = [
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    ]
    try:
        line = _output(
            [
                "nvidia-smi",
                f"--id={torch.cuda.current_device()}",
                f"--query-gpu={','.join(fields)}",
                "--format=csv,noheader",
            ]
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def _machine() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "nvidia_smi_idle": query_gpu(),
    }
