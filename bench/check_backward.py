"""Are gradients right? As bench/check.py, for the backward pass."""

from __future__ import annotations

import torch

from bench.cells import Cell
from bench.check import Attention, Options, Parts


class GradientReference(Parts):
    """The gradients of the first and the last key head in fp64, and the error allowed in each of
    their rows."""

    def __init__(self, cell: Cell, *inputs: torch.Tensor, options: Options | None = None):
        super().__init__()
        group = cell.heads // cell.heads_kv
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
