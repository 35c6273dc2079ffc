"""Is an output right? Nothing is timed before it has passed here."""

from __future__ import annotations

import torch

from bench.cells import Cell

SAMPLED_ROWS = 64


def _attention_rows(q, k, v, rows, cell: Cell, dtype: torch.dtype) -> torch.Tensor:
    """Plain attention of the query rows `rows` of every head, all arithmetic in `dtype`."""
    q_rows = q[:, rows].transpose(1, 2).to(dtype)
    group = cell.heads // cell.heads_kv
    keys, values = (t.transpose(1, 2).to(dtype).repeat_interleave(group, 1) for t in (k, v))
    scores = (q_rows @ keys.transpose(-1, -2)) * cell.head_dim**-0.5
    if cell.causal:
        columns = torch.arange(cell.seqlen_k, device=q.device)
        last = rows + cell.seqlen_k - cell.seqlen
        scores.masked_fill_(columns[None, :] > last[:, None], float("-inf"))
    return (torch.softmax(scores, dim=-1) @ values).transpose(1, 2)


class Reference:
    """Some query rows of every head in fp64, and the error allowed there.

    The field's tolerance: at most twice the error of plain attention in the cell's dtype, plus one
    rounding of the result.
    """

    def __init__(self, cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        count = min(SAMPLED_ROWS, cell.seqlen)
        self._rows = torch.linspace(0, cell.seqlen - 1, count, device=q.device).round().long()
        self._expected = _attention_rows(q, k, v, self._rows, cell, torch.float64)
        plain = _attention_rows(q, k, v, self._rows, cell, q.dtype).double()
        rounding = self._expected.abs().max().item() * torch.finfo(q.dtype).eps
        self.tolerance = 2 * (plain - self._expected).abs().max().item() + rounding

    @property
    def size(self) -> float:
        """Root mean square of the result."""
        return self._expected.square().mean().sqrt().item()

    def error(self, out: torch.Tensor) -> float:
        """Largest absolute error of `out`; infinite if any of its elements is not finite."""
        if not torch.isfinite(out).all():
            return float("inf")
        return (out[:, self._rows].double() - self._expected).abs().max().item()

    def rmse(self, out: torch.Tensor) -> float:
        """Root mean square error of `out`."""
        return (out[:, self._rows].double() - self._expected).square().mean().sqrt().item()
