"""Is an output right? Nothing is timed before it has passed here.

Row by row, since a row that is wrong hides behind the largest error of others: peaked scores make
rows of one key, whose rounding is that of V itself, beside rows of thousands, whose errors average
out. What a row may be off by is the tests' bound (tests/oracle.py): what an implementation in the
dtype has to round. Attention in the dtype itself, twice of whose error is the field's tolerance,
is no measure here: it rounds scores too, by whole units where they are large, and then anything
passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cells import Cell

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # no part of any package

from oracle import Attention, Changes  # noqa: F401  variants have Changes from here

SAMPLES, SAMPLED_ROWS = 8, 8
# Of FP8 attention to what is in 8 bits already: P is rounded to e4m3, whose products add up in
# about 14 bits; P as it is, scaled by 2^8 at most, is subnormal below 2^-14
FP8 = {"u": 2.0**-4, "noise": 2.0**-13, "underflow": 2.0**-18}
TOLERANCE = 2.0  # of the bound: others may round once more than we

# Of some batch entries and heads: what Attention takes beside q, k, v and the softmax scale
Options = Callable[[slice, slice], dict[str, Any]]


def largest_error(off: torch.Tensor, allowed: torch.Tensor) -> float:
    """Of the rows of `off`, in units of what is allowed; infinite if one is not a number."""
    flushed = 2 * torch.finfo(torch.float32).tiny * off.shape[-1] ** 0.5  # denormal numbers are 0
    return (off.norm(dim=-1) / (allowed + flushed)).nan_to_num(nan=float("inf")).max().item()


class Reference:
    """Some query rows of every head in fp64, and the error allowed there.

    `options`: what else the cell does not say, its mask with it. `rounding`: what rounds more than
    the tensors' dtype does, by the names of the bound's fields.
    """

    tolerance = TOLERANCE

    def __init__(
        self,
        cell: Cell,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        options: Options | None = None,
        **rounding,
    ):
        given = options(slice(None), slice(None)) if options else {"causal": cell.causal}
        count = min(SAMPLED_ROWS, cell.seqlen)
        firsts = torch.linspace(0, cell.seqlen - count, SAMPLES).round().long().unique().tolist()
        scale = cell.head_dim**-0.5
        expected, allowed = [], []
        for first in firsts:  # one at a time: each has a copy of K and V in fp64
            rows = q[:, first : first + count]
            place = {"first_query": first, "seqlen_q": cell.seqlen}
            exact = Attention(rows, k, v, scale, **given, **place)
            vars(exact).update(rounding)
            expected.append(exact.out)
            allowed.append(exact.out_allowed())
        self._rows = torch.cat([torch.arange(i, i + count, device=q.device) for i in firsts])
        self._expected, self._allowed = torch.cat(expected, 1), torch.cat(allowed, 1)

    @property
    def size(self) -> float:
        """Root mean square of the result."""
        return self._expected.square().mean().sqrt().item()

    def _off(self, out: torch.Tensor) -> torch.Tensor:
        return out[:, self._rows].double() - self._expected

    def error(self, out: torch.Tensor) -> float:
        """Largest error of a row of `out` in units of what is allowed there; infinite if any
        element of `out` is not finite."""
        if not torch.isfinite(out).all():
            return float("inf")
        return largest_error(self._off(out), self._allowed)

    def rmse(self, out: torch.Tensor) -> float:
        """Root mean square error of `out`."""
        return self._off(out).square().mean().sqrt().item()


class Parts:
    """Right values of parts of the results, and the error allowed in each row of these.

    A part: which of the results, where in it, the right values, what their rows may be off by.
    """

    tolerance = TOLERANCE

    def __init__(self):
        self._parts: list[tuple] = []

    def error(self, results: tuple[torch.Tensor, ...]) -> float:
        """The largest error of a row of any part, in units of what is allowed there; infinite if
        an element of the results is not finite."""
        if not all(torch.isfinite(result).all() for result in results):
            return float("inf")
        return max(
            largest_error(results[index][place] - right, allowed)
            for index, place, right, allowed in self._parts
        )

    def rmse(self, results: tuple[torch.Tensor, ...]) -> float:
        """The largest of the parts' root mean square errors, relative to their own."""
        return max(
            ((results[index][place] - right).norm() / right.norm()).item()
            for index, place, right, _ in self._parts
        )
