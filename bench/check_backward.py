"""Are gradients right? As bench/check.py, for the backward pass."""

from __future__ import annotations

import torch

from bench.cells import Cell
from bench.check import TOLERANCE, Attention, Options, largest_error


class GradientReference:
    """The gradients of the first and the last key head in fp64, and the error allowed in each of
    their rows."""

    tolerance = TOLERANCE

    def __init__(self, cell: Cell, *inputs: torch.Tensor, options: Options | None = None):
        group = cell.heads // cell.heads_kv
        self._parts = []
        for batch, head in {(0, 0), (cell.batch - 1, cell.heads_kv - 1)}:
            of_queries = (
                slice(batch, batch + 1),
                slice(None),
                slice(head * group, (head + 1) * group),
            )
            of_keys = slice(batch, batch + 1), slice(None), slice(head, head + 1)
            places = (of_queries, of_keys, of_keys)  # of q, k, v and their gradients
            q, k, v, grad_out = (
                x[place] for x, place in zip(inputs, (*places, of_queries), strict=True)
            )
            batches, _, heads = of_queries
            given = options(batches, heads) if options else {"causal": cell.causal}
            exact = Attention(q, k, v, cell.head_dim**-0.5, **given).gradients(grad_out)
            for index, (place, (right, allowed)) in enumerate(zip(places, exact, strict=True)):
                self._parts.append((index, place, right, allowed))

    def error(self, grads: tuple[torch.Tensor, ...]) -> float:
        """The largest error of a row of any of the gradients, in units of what is allowed there;
        infinite if an element is not finite."""
        if not all(torch.isfinite(grad).all() for grad in grads):
            return float("inf")
        return max(
            largest_error(grads[index][place] - right, allowed)
            for index, place, right, allowed in self._parts
        )

    def rmse(self, grads: tuple[torch.Tensor, ...]) -> float:
        """The largest of the gradients' root mean square errors, relative to their own."""
        return max(
            ((grads[index][place] - right).norm() / right.norm()).item()
            for index, place, right, _ in self._parts
        )
