"""Finds the fastest forward kernel for calls of a kind, and remembers it."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cute_kernels.compile.build import cache_folder, locked, say
from cute_kernels.compile.search import SPEED, SearchSpace, search_space
from cute_kernels.interface import flash_attn_func
from cute_kernels.plugins import add_rows, compile_candidates, load_new
from cute_kernels.tiles import tile_configs

Call = Callable[[], object]
Timer = Callable[[Call], float]

FILE = "tuned.json"
ROUNDS = 9
CALLS = 10  # of a sample of the GPU's time
LEAST_GAIN = 0.01  # what is less is the noise of a measurement: the automatic choice stays
CHECKED_LENGTHS = ((113, 1000), (1000, 113), (300, 300))  # no multiples of a tile
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        name: of the fastest row, which the automatic choice takes from now on.
        automatic: of the row that it took before.
        seconds: of a call, the median, by row, the fastest first.
        refused: how many rows of the search space cannot become a kernel, by reason.
        failed: why a candidate was not timed, by row: its compiler's error, or wrong results.
    """

    name: str
    automatic: str
    seconds: dict[str, float]
    refused: dict[str, int]
    failed: dict[str, str]

    def table(self) -> str:
        """The rows that were timed, with their speed relative to the automatic choice's."""
        width = max(map(len, self.seconds))
        lines = [f"{'row':{width}}  {'µs':>10}  {'speed':>6}"]
        for name, seconds in self.seconds.items():
            speed = self.seconds[self.automatic] / seconds
            mark = "  <- automatic choice before" if name == self.automatic else ""
            lines.append(f"{name:{width}}  {1e6 * seconds:10.1f}  {speed:6.3f}{mark}")
        lines += [f"failed: {name}: {why.splitlines()[0]}" for name, why in self.failed.items()]
        lines += [f"refused: {count} rows for {why}" for why, count in self.refused.items()]
        return "\n".join([*lines, f"fastest: {self.name}"])


def tune(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    candidates: int = 12,
    jobs: int | None = None,
    timer: Timer | None = None,
) -> Tuned:
    """Compiles forward rows that the build does not have, checks and times them beside its own on
    this call, and makes the fastest the automatic choice of its kind: of its dtype, head dim and
    mask, and of as many queries, keys and heads (times batch) in powers of two, each rounded up.
    The file tuned.json in the cache keeps it for `use_tuned`.

    A candidate whose results are further from an fp64 reference than those of the automatic
    choice may be is not timed. The others take turns; the median counts. One that is less than 1%
    faster than the automatic choice does not replace it.

    Args:
        q, k, v: as of `flash_attn_func`, on the GPU, fp16 or bf16, of one head dim. What they hold
            matters little; random numbers of N(0, 1) will do.
        causal: as of `flash_attn_func`.
        candidates: how many new rows to try; each is a minute of nvcc for one core, unless the
            cache has it. 0 tries the build's rows and the added ones alone.
        jobs: how many kernels to compile at a time; by default as many as cores and memory allow.
        timer: instead of the GPU's clock: takes a call, calls it and returns its seconds.

    Raises:
        ValueError, TypeError: as `flash_attn_func`; k or v has no rows; a number is not allowed.
        RuntimeError: as `add_tile_config`, where no candidate compiles.
    """
    for name, number, least in (("candidates", candidates, 0), ("jobs", jobs, 1)):
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}, must be at least {least}")
    if timer is None and q.device.type != "cuda":
        raise ValueError(f"q is on {q.device}, must be on a GPU: kernels are timed there")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q has dtype {q.dtype}, must be float16 or bfloat16")
    flash_attn_func(q, k, v, causal=causal)  # refuses what is no call
    if v.shape[3] != q.shape[3]:
        raise ValueError(f"v has head_dim {v.shape[3]}, must be {q.shape[3]} like q")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q and k are {tuple(q.shape)} and {tuple(k.shape)}, must not be empty")
    sizes = _sizes(q, k, causal)
    automatic = _automatic(q, sizes)
    there = [row for row in tile_configs("forward") if _fits(row, q, causal)]
    rows, refused = tune_rows(q.dtype, q.shape[3], candidates)
    libraries, errors = compile_candidates(rows, jobs)
    if rows and not libraries:
        raise next(iter(errors.values()))
    load_new(rows, libraries)
    names = dict.fromkeys([automatic, *(row["name"] for row in there), *libraries])
    allowed = _distances(automatic, q, causal)
    failed = {name: str(error) for name, error in errors.items()}
    calls: dict[str, Call] = {}
    for name in names:
        if name == automatic or (wrong := _why_wrong(name, q, causal, allowed)) is None:
            calls[name] = _call(name, q, k, v, causal)
        else:
            failed[name] = wrong
    say(f"timing {len(calls)} rows")
    seconds = measure(calls, timer or gpu_seconds)
    fastest = min(seconds, key=lambda name: seconds[name])
    if seconds[fastest] > (1 - LEAST_GAIN) * seconds[automatic]:
        fastest = automatic
    by_name = {row["name"]: row for row in tile_configs("forward")}
    _remember({"kind": _kind(q, sizes), "row": by_name[fastest], "seconds": seconds})
    torch.ops.cute_kernels.prefer_tile_config(fastest, **sizes)
    return Tuned(fastest, automatic, seconds, dict(refused), failed)


def tune_rows(dtype: torch.dtype, head_dim: int, candidates: int) -> SearchSpace:
    """The new rows that `tune` tries, and how many others cannot become a kernel. Their head dim
    is one that the build has: of a smaller one the automatic choice would take them unmeasured."""
    built = [
        row
        for row in tile_configs("forward")
        if row["dtype"] == _DTYPES[dtype] and row["head_dim"] >= head_dim and row["speed"] != SPEED
    ]
    if not built:
        raise ValueError(f"head_dim is {head_dim}, and this build has no {dtype} row for it")
    least = min(row["head_dim"] for row in built)
    rows, refused = search_space(_DTYPES[dtype], least, built)
    return SearchSpace(rows[:candidates], refused)


def use_tuned() -> list[str]:
    """From now on the automatic choice takes what `tune` found on GPUs like the current one with
    this build. A row that is no longer in the cache is compiled again.

    Returns:
        The names of the rows, one for each kind of calls.

    Raises:
        RuntimeError: as `add_tile_config`.
    """
    entries = [
        entry
        for entry in read(cache_folder() / FILE)
        if entry["kind"]["gpu"] == _gpu() and entry["kind"]["headers"] == _headers()
    ]
    known = {row["name"] for row in tile_configs("forward")}
    missing = {entry["row"]["name"]: entry["row"] for entry in entries}
    add_rows([row for name, row in missing.items() if name not in known])
    for entry in entries:
        torch.ops.cute_kernels.prefer_tile_config(entry["row"]["name"], **entry["kind"]["sizes"])
    return [entry["row"]["name"] for entry in entries]


def measure(calls: Mapping[str, Call], timer: Timer, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of a call, the median of rounds in which all take turns, by name, the fastest first.
    Every second round goes backwards: nobody always runs behind the same other one."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            samples[name].append(timer(calls[name]))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def gpu_seconds(call: Call) -> float:
    """Of one of several calls in a CUDA graph, so that the host's time does not count."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / CALLS


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of the file: none where there is no file, or something else."""
    try:
        entries = json.loads(path.read_text("utf-8"))
        if all(entry["kind"]["sizes"] and entry["row"]["name"] for entry in entries):
            return list(entries)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError):
        pass
    say(f"{path} is not what tune wrote, and is not used")
    return []


def _remember(entry: dict[str, Any]) -> None:
    """Replaces the entry of its kind. The file is there whole, or as it was."""
    path = cache_folder() / FILE
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(path.with_name(f".{FILE}.lock"), FILE):
            entries = [other for other in read(path) if other["kind"] != entry["kind"]]
            handle, temporary = tempfile.mkstemp(prefix=f".{FILE}.", dir=path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump([*entries, entry], file, indent=1)
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
    except OSError as error:
        say(f"cannot write {path}, what was found is for this process alone: {error}")


def _sizes(q: torch.Tensor, k: torch.Tensor, causal: bool) -> dict[str, Any]:
    """The arguments of the operators that choose."""
    batch, seqlen_q, heads, head_dim = q.shape
    sizes = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": k.shape[1]}
    return {**sizes, "heads": heads, "head_dim": head_dim, "causal": causal}


def _kind(q: torch.Tensor, sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "gpu": _gpu(q.device),
        "headers": _headers(),
        "dtype": _DTYPES[q.dtype],
        "sizes": sizes,
    }


def _gpu(device: torch.device | None = None) -> str:
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return "none"
    return str(torch.cuda.get_device_name(device))


def _headers() -> str:
    return str(torch.ops.cute_kernels.plugin_requirements()[1])


def _automatic(q: torch.Tensor, sizes: dict[str, Any]) -> str:
    multiprocessors = 132
    if q.device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    choose = torch.ops.cute_kernels.choose_tile_config
    return str(choose(q.dtype, **sizes, multiprocessors=multiprocessors))


def _fits(row: dict[str, Any], q: torch.Tensor, causal: bool) -> bool:
    return (
        row["dtype"] == _DTYPES[q.dtype]
        and min(row["head_dim"], row["head_dim_v"]) >= q.shape[3]
        and row["mask"] in ("any", "causal" if causal else "full")
        and not row["softcap"]
    )


def _call(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    return lambda: flash_attn_func(q, k, v, causal=causal, tile_config=name)


def _distances(name: str, q: torch.Tensor, causal: bool) -> list[tuple[float, float]]:
    """How far from fp64 the row of an output is that is furthest, and the LSE, for small calls."""
    found = []
    for lengths in CHECKED_LENGTHS:
        generator = torch.Generator().manual_seed(lengths[0])
        q1, k1, v1 = (
            torch.randn(2, seqlen, 2, q.shape[3], generator=generator).to(q.dtype)
            for seqlen in (*lengths, lengths[1])
        )
        out, lse = flash_attn_func(
            q1.to(q.device),
            k1.to(q.device),
            v1.to(q.device),
            causal=causal,
            return_lse=True,
            tile_config=name,
        )
        exact, exact_lse = flash_attn_func(
            q1.double(), k1.double(), v1.double(), causal=causal, return_lse=True
        )
        of_rows = (out.cpu().double() - exact).norm(dim=-1)
        of_lse = (lse.cpu().double() - exact_lse).masked_fill(exact_lse == lse.cpu(), 0.0)
        found.append((float(of_rows.max()), float(of_lse.abs().max())))
    return found


def _why_wrong(
    name: str, q: torch.Tensor, causal: bool, allowed: list[tuple[float, float]]
) -> str | None:
    """None if no row is twice as far off as the furthest of the automatic choice."""
    found = _distances(name, q, causal)
    for lengths, (out, lse), (most, most_lse) in zip(CHECKED_LENGTHS, found, allowed, strict=True):
        if not (out <= 2 * most and lse <= 2 * most_lse + 1e-4):  # NaN is wrong
            return (
                f"wrong for {lengths[0]} queries and {lengths[1]} keys: a row of the output is off "
                f"by {out:.2g} and an LSE by {lse:.2g}, those of the automatic choice by "
                f"{most:.2g} and {most_lse:.2g}"
            )
    return None
