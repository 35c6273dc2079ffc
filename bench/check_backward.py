"""Are gradients right? As bench/check.py, for the backward pass."""

from __future__ import annotations

import torch

from bench.cells import Cell


def _gradients(q, k, v, grad_out, cell: Cell, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Those of plain attention by autograd, all arithmetic in `dtype`; one key head."""
    leaves = [x.detach().transpose(0, 1).to(dtype).requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        scores = (leaves[0] @ leaves[1].mT) * cell.head_dim**-0.5
        if cell.causal:
            hidden = torch.ones(cell.seqlen, cell.seqlen_k, dtype=torch.bool, device=q.device)
            hidden = hidden.triu_(1 + cell.seqlen_k - cell.seqlen)
            scores = scores.masked_fill(hidden, float("-inf"))
        out = torch.softmax(scores, dim=-1) @ leaves[2]
        grads = torch.autograd.grad(out, leaves, grad_out.transpose(0, 1).to(dtype))
    return tuple(grad.transpose(0, 1) for grad in grads)


class GradientReference:
    """The gradients of the first and the last key head in fp32, and the error allowed there.

    The field's tolerance for each of the three: at most twice the error of plain attention in the
    cell's dtype, plus one rounding. Errors are in units of what is allowed.
    """

    tolerance = 1.0

    def __init__(self, cell: Cell, *inputs: torch.Tensor):
        group = cell.heads // cell.heads_kv
        self._parts = []
        for batch, head in {(0, 0), (cell.batch - 1, cell.heads_kv - 1)}:
            of_queries = batch, slice(None), slice(head * group, (head + 1) * group)
            of_keys = batch, slice(None), slice(head, head + 1)
            places = (of_queries, of_keys, of_keys)  # of q, k, v and their gradients
            part = [x[place] for x, place in zip(inputs, (*places, of_queries), strict=True)]
            exact = _gradients(*part, cell, torch.float32)
            plain = _gradients(*part, cell, inputs[0].dtype)
            for index, (place, right, other) in enumerate(zip(places, exact, plain, strict=True)):
                rounding = right.abs().max().item() * torch.finfo(other.dtype).eps
                allowed = 2 * (other - right).abs().max().item() + rounding
                self._parts.append((index, place, right, allowed))

    def error(self, grads: tuple[torch.Tensor, ...]) -> float:
        """The largest error of any of the gradients; infinite if an element is not finite."""
        if not all(torch.isfinite(grad).all() for grad in grads):
            return float("inf")
        return max(
            (grads[index][place] - right).abs().max().item() / allowed
            for index, place, right, allowed in self._parts
        )

    def rmse(self, grads: tuple[torch.Tensor, ...]) -> float:
        """The largest of the gradients' root mean square errors, relative to their own."""
        return max(
            ((grads[index][place] - right).norm() / right.norm()).item()
            for index, place, right, _ in self._parts
        )
