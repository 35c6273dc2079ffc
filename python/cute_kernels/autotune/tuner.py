"""The search for the fastest kernel."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from typing import Any

import torch

from cute_kernels.autotune.timing import Call, GpuTimer, Timer, measure
from cute_kernels.autotune.trials import (
    DTYPES,
    RESULTS,
    Run,
    Trial,
    bind,
    cases_like,
    distances,
    why_wrong,
)
from cute_kernels.autotune.tuned import FILE, Tuned, read, remember, write_record
from cute_kernels.checks import HEAD_DIM_MULTIPLE
from cute_kernels.compile.build import cache_folder, say
from cute_kernels.compile.search import SearchSpace, search_space
from cute_kernels.fp8.checks import HEAD_DIM_MULTIPLE as HEAD_DIM_MULTIPLE_FP8
from cute_kernels.interface import flash_attn_func
from cute_kernels.plugins import add_rows, compile_candidates, load_new
from cute_kernels.tiles import tile_configs

LEAST_GAIN = 0.01  # what is less is the noise of a measurement: the automatic choice stays
_INPUTS = (torch.bfloat16, torch.float16)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tune(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    of_pass: str = "forward",
    causal: bool = False,
    qk_dtype: torch.dtype = torch.int8,
    candidates: int = 12,
    jobs: int | None = None,
    timer: Timer | None = None,
    keep: bool = True,
    record: str | os.PathLike[str] | None = None,
) -> Tuned:
    """Compiles rows of a pass that the build does not have, checks and times them beside its own on
    this call, and makes the fastest the automatic choice of its kind: of its dtype, head dim and
    mask, and of as many queries, keys and heads (times batch) in powers of two, each rounded up.
    The file tuned.json in the cache keeps it for `use_tuned`.

    A candidate whose results are further from an fp64 reference than those of the automatic
    choice may be is not timed. The others take turns; the median counts. One that is less than 1%
    faster than the automatic choice, or is so no more when the two are timed again, does not
    replace it.

    Args:
        q, k, v: as of `flash_attn_func`, on the GPU, fp16 or bf16, of one head dim. Numbers such as
            the calls' own: how peaked the scores are changes which kernel is fastest.
        of_pass: "forward", "backward" (the gradients, in the default mode) or "forward_fp8" (the
            attention of `flash_attn_fp8_func` alone; the tensors are quantised before).
        causal: as of `flash_attn_func`.
        qk_dtype: as of `flash_attn_fp8_func`, of that pass alone.
        candidates: how many new rows to try; each is a minute or two of nvcc for one core, unless
            the cache has it. 0 tries the build's rows and the added ones alone.
        jobs: how many kernels to compile at a time; by default as many as cores and memory allow.
        timer: instead of the GPU's clock: takes a call, calls it and returns its seconds.
        keep: False only measures: the automatic choice and tuned.json stay as they are.
        record: a file for all that was measured; `python -m cute_kernels plot` draws it.

    Raises:
        ValueError, TypeError: as `flash_attn_func`; k or v has no rows; an argument is not as
            described; the build has no row of the pass for such calls.
        RuntimeError: as `add_tile_config`, where no candidate compiles.
        OSError: the record cannot be written.
    """
    if timer is None and q.device.type != "cuda":
        raise ValueError(f"q is on {q.device}, must be on a GPU: kernels are timed there")
    _check_options(of_pass, qk_dtype, candidates, jobs)
    q, k, v = (x.detach() for x in (q, k, v))
    _check_call(q, k, v, causal)
    dtype = qk_dtype if of_pass == "forward_fp8" else q.dtype
    trial = Trial(of_pass, _NAMES[dtype], _built(of_pass, _NAMES[dtype], q.shape[3]), causal)
    rows, refused = SearchSpace([], Counter())
    if candidates:
        rows, refused = tune_rows(of_pass, trial.dtype, trial.head_dim, candidates)
    there = [row["name"] for row in tile_configs(of_pass) if trial.takes(row)]
    sizes = _sizes(q, k, causal)
    automatic = _automatic(trial, q.device, sizes)
    libraries, errors = compile_candidates(rows, jobs)
    if rows and not libraries:
        raise next(iter(errors.values()))
    load_new(rows, libraries)
    cases = cases_like(trial, q)
    allowed = distances(cases, automatic)
    failed = {name: str(error) for name, error in errors.items()}
    run, calls = bind(trial, q, k, v, torch.randn_like(q)), dict[str, Call]()
    for name in dict.fromkeys([automatic, *there, *libraries]):
        if name == automatic or (wrong := why_wrong(trial, cases, name, allowed)) is None:
            calls[name] = _call(run, name)
        else:
            failed[name] = wrong
    say(f"timing {len(calls)} rows")
    timer = timer or GpuTimer()
    samples = measure(calls, timer)
    fastest = next(iter(samples))
    if not _is_faster(samples, fastest, automatic) or not _is_faster(
        measure({name: calls[name] for name in (automatic, fastest)}, timer), fastest, automatic
    ):
        fastest = automatic
    by_name = {row["name"]: row for row in tile_configs(of_pass)}
    found = Tuned(
        kind=_kind(trial, q.device, sizes),
        name=fastest,
        automatic=automatic,
        samples=samples,
        rows={name: by_name[name] for name in samples},
        refused=dict(refused),
        failed=failed,
    )
    if keep:
        remember({"kind": found.kind, "row": by_name[fastest], "seconds": found.seconds})
        torch.ops.cute_kernels.prefer_tile_config(fastest, **sizes)
    if record is not None:
        write_record(record, [found])
    return found


def _check_options(of_pass: str, qk_dtype: torch.dtype, candidates: int, jobs: int | None) -> None:
    if of_pass not in RESULTS:
        raise ValueError(f"of_pass is {of_pass!r}, must be one of {', '.join(RESULTS)}")
    if qk_dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"qk_dtype is {qk_dtype}, must be int8 or float8_e4m3fn")
    for name, number, least in (("candidates", candidates, 0), ("jobs", jobs, 1)):
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}, must be at least {least}")


def _check_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
    if q.dtype not in _INPUTS:
        raise TypeError(f"q has dtype {q.dtype}, must be float16 or bfloat16")
    flash_attn_func(q, k, v, causal=causal)  # refuses what is no call
    if v.shape[3] != q.shape[3]:
        raise ValueError(f"v has head_dim {v.shape[3]}, must be {q.shape[3]} like q")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q and k are {tuple(q.shape)} and {tuple(k.shape)}, must not be empty")


def tune_rows(of_pass: str, dtype: str, head_dim: int, candidates: int) -> SearchSpace:
    """The new rows that `tune` tries, and how many others cannot become a kernel. Their head dim
    is one that the build has, the least that fits."""
    built = [
        row for row in tile_configs(of_pass) if row["mask"] != "none" and not row.get("grouped")
    ]
    rows, refused = search_space(of_pass, dtype, _built(of_pass, dtype, head_dim), built)
    return SearchSpace(rows[:candidates], refused)


def _built(of_pass: str, dtype: str, head_dim: int) -> int:
    """The least head dim of the build that fits."""
    multiple = HEAD_DIM_MULTIPLE_FP8 if of_pass == "forward_fp8" else HEAD_DIM_MULTIPLE
    if head_dim % multiple != 0:
        raise ValueError(f"head_dim is {head_dim}, must be a multiple of {multiple}")
    there = [
        row["head_dim"]
        for row in tile_configs(of_pass)
        if row["dtype"] == dtype and row["head_dim"] >= head_dim and not row.get("softcap", False)
    ]
    if not there:
        raise ValueError(
            f"head_dim is {head_dim}, and this build has no {of_pass} row of {dtype} for it"
        )
    return int(min(there))


def use_tuned() -> list[str]:
    """From now on the automatic choice takes what `tune` found on GPUs like the current one with
    this build's headers, in the passes that this build has. A row that is no longer in the cache is
    compiled again.

    Returns:
        The names of the rows, one for each kind of calls.

    Raises:
        RuntimeError: as `add_tile_config`.
    """
    entries = [
        entry
        for entry in read(cache_folder() / FILE)
        if entry["kind"]["gpu"] == _gpu()
        and entry["kind"]["headers"] == _headers()
        and tile_configs(entry["kind"]["pass"])
    ]
    known = {row["name"] for row in tile_configs()}
    missing = {entry["row"]["name"]: entry["row"] for entry in entries}
    add_rows([row for name, row in missing.items() if name not in known])
    for entry in entries:
        torch.ops.cute_kernels.prefer_tile_config(entry["row"]["name"], **entry["kind"]["sizes"])
    return [entry["row"]["name"] for entry in entries]


def _call(run: Run, name: str) -> Call:
    return lambda: run(name)


def _is_faster(samples: dict[str, list[float]], name: str, other: str) -> bool:
    """By more than noise."""
    most = (1 - LEAST_GAIN) * statistics.median(samples[other])
    return statistics.median(samples[name]) <= most


def _sizes(q: torch.Tensor, k: torch.Tensor, causal: bool) -> dict[str, Any]:
    """The arguments of the operators that choose."""
    batch, seqlen_q, heads, head_dim = q.shape
    sizes = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": k.shape[1]}
    return {**sizes, "heads": heads, "head_dim": head_dim, "causal": causal}


def _kind(trial: Trial, device: torch.device, sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "gpu": _gpu(device),
        "headers": _headers(),
        "pass": trial.of_pass,
        "dtype": trial.dtype,
        "sizes": sizes,
    }


def _gpu(device: torch.device | None = None) -> str:
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return "none"
    return str(torch.cuda.get_device_name(device))


def _headers() -> str:
    return str(torch.ops.cute_kernels.plugin_requirements()[1])


def _automatic(trial: Trial, device: torch.device, sizes: dict[str, Any]) -> str:
    multiprocessors = 132
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    choose = torch.ops.cute_kernels.choose_tile_config
    found = choose(
        DTYPES[trial.dtype], **sizes, multiprocessors=multiprocessors, of_pass=trial.of_pass
    )
    return str(found)
