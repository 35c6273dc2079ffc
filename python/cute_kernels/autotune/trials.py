"""Calls of a pass by any of its kernels, and whether what these answer is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_kernels.fp8 import flash_attn_fp8_func, quantize_fp8
from cute_kernels.interface import flash_attn_func
from cute_kernels.operators import flash_attn_backward

# The dtypes of kernels by name; of FP8 kernels that of Q and K.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
}
RESULTS = {
    "forward": ("output", "LSE"),
    "backward": ("gradient of q", "gradient of k", "gradient of v"),
    "forward_fp8": ("output", "LSE"),
}
CHECKED_LENGTHS = ((113, 1000), (1000, 113), (300, 300))  # no multiples of a tile
NOISE = 1e-4  # of an LSE that may be exact, or a gradient of nothing


@dataclass(frozen=True)
class Trial:
    """Which kernels: of a pass, a dtype, a head dim and a mask."""

    of_pass: str
    dtype: str
    head_dim: int
    causal: bool

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether it is such a row, also one that the automatic choice may not take."""
        return (
            row["pass"] == self.of_pass
            and row["dtype"] == self.dtype
            and row["head_dim"] == row.get("head_dim_v", row["head_dim"]) == self.head_dim
            and not (row.get("softcap", False) or row.get("grouped"))
            and row["mask"] in ("any", "none", "causal" if self.causal else "full")
        )


Run = Callable[[str | None], tuple[Tensor, ...]]  # the results that RESULTS names, of a row


def bind(trial: Trial, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> Run:
    """The trial's call on these tensors; what comes before the kernel is done here."""
    causal = trial.causal
    if trial.of_pass == "forward":
        return lambda name: _pair(
            flash_attn_func(q, k, v, causal=causal, return_lse=True, tile_config=name)
        )
    if trial.of_pass == "backward":
        out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
        inputs = grad_out, None, q, k, v, out, lse, q.shape[3] ** -0.5, causal, False
        return lambda name: tuple(flash_attn_backward(*inputs, name)[:3])  # no sinks
    dtype = DTYPES[trial.dtype]
    q8, k8 = (quantize_fp8(x, incoherent=True, dtype=dtype) for x in (q, k))
    v8 = quantize_fp8(v, block=None)
    return lambda name: _pair(
        flash_attn_fp8_func(
            q8, k8, v8, causal=causal, out_dtype=q.dtype, return_lse=True, tile_config=name
        )
    )


def _pair(results: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(results)


class Case(NamedTuple):
    """A small call, and what is right."""

    queries: int
    keys: int
    run: Run
    exact: tuple[Tensor, ...]


def cases_like(trial: Trial, q: Tensor) -> list[Case]:
    """Calls of q's dtype and head dim on its device; what is right is computed in fp64."""
    found = []
    for queries, keys in CHECKED_LENGTHS:
        generator = torch.Generator().manual_seed(queries)
        inputs = [
            torch.randn(2, seqlen, 2, q.shape[3], generator=generator).to(q.dtype)
            for seqlen in (queries, keys, keys, queries)
        ]
        unquantised = replace(trial, of_pass=trial.of_pass.removesuffix("_fp8"))
        exact = bind(unquantised, *(x.double() for x in inputs))(None)
        run = bind(trial, *(x.to(q.device) for x in inputs))
        found.append(Case(queries, keys, run, exact))
    return found


def distances(cases: list[Case], name: str) -> list[tuple[float, ...]]:
    """How far from what is right the row of each result is that is furthest, by case."""
    return [tuple(map(_furthest, case.run(name), case.exact)) for case in cases]


def _furthest(result: Tensor, exact: Tensor) -> float:
    result = result.cpu().double()
    difference = (result - exact).masked_fill(result == exact, 0.0)  # also where both are -inf
    rows = difference if exact.dim() == 4 else difference.unsqueeze(-1)  # an LSE is of a row
    return float(rows.norm(dim=-1).max())


def why_wrong(
    trial: Trial, cases: list[Case], name: str, allowed: list[tuple[float, ...]]
) -> str | None:
    """None if no row is twice as far off as the furthest of the automatic choice."""
    try:
        found = distances(cases, name)
    except (RuntimeError, ValueError) as refusal:  # of a launch, or of such calls
        return f"fails: {refusal}"
    for case, off, most in zip(cases, found, allowed, strict=True):
        for result, far, reference in zip(RESULTS[trial.of_pass], off, most, strict=True):
            if not far <= 2 * reference + NOISE:  # NaN is wrong
                return (
                    f"wrong for {case.queries} queries and {case.keys} keys: a row of the {result} "
                    f"is off by {far:.2g}, that of the automatic choice by {reference:.2g}"
                )
    return None
