"""The tensors of packed sequences, and which results for them are right."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from bench.cells import NORMAL, Cell
from bench.check import Attention, Parts
from bench.distributions import draw
from bench.packed_cells import PackedCell

WHOLE = 2048  # up to here all gradients of a sequence are compared
LAST_ROWS = 256  # of a longer one
SAMPLES, SAMPLED_ROWS = 4, 8


def offsets(lengths: tuple[int, ...]) -> list[int]:
    """0, and where each sequence ends."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


@cache
def starts(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """cu_seqlens; made once, as a graph that is captured may copy nothing from the host."""
    return torch.tensor(offsets(lengths), dtype=torch.int32, device=device)


@cache
def sinks_of(heads: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers in every dtype."""
    generator = torch.Generator(device).manual_seed(2)
    numbers = torch.randn(heads, generator=generator, device=device, dtype=torch.bfloat16)
    return numbers.to(dtype)


def packed_inputs(cell: PackedCell, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """q, k and v, (tokens, heads, head_dim): each sequence with the cell's data."""
    drawn = [
        draw(_sequence(cell, length), device, seed=number)
        for number, length in enumerate(cell.lengths)
    ]
    q, k, v = (torch.cat(parts, 1)[0] for parts in zip(*drawn, strict=True))
    return q, k, v[..., : cell.head_dim_v].contiguous()


def packed_inputs_and_gradient(cell: PackedCell, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the output, which is always N(0, 1)."""
    one = replace(_sequence(cell, sum(cell.lengths)), head_dim=cell.head_dim_v, data=NORMAL)
    return *packed_inputs(cell, device), draw(one, device, seed=len(cell.lengths))[0][0]


def _sequence(cell: PackedCell, length: int) -> Cell:
    names = ("dtype", "mask", "heads", "heads_kv", "head_dim", "data")
    return Cell(batch=1, seqlen=length, **{name: getattr(cell, name) for name in names})


class _Sampled(Parts):
    """Of the first, the longest and the last sequence, with the first and the last key head."""

    def __init__(self, cell: PackedCell, *inputs: torch.Tensor):
        super().__init__()
        group = cell.heads // cell.heads_kv
        longest = cell.lengths.index(max(cell.lengths))
        at = offsets(cell.lengths)
        for sequence in sorted({0, longest, len(cell.lengths) - 1}):
            for head in sorted({0, cell.heads_kv - 1}):
                heads = slice(head * group, (head + 1) * group)
                self._add(cell, at[sequence], at[sequence + 1], heads, head, *inputs)

    def _add(self, cell, begin, end, heads, head, *inputs) -> None:
        raise NotImplementedError

    @staticmethod
    def _attention(cell, begin, first, last, heads, head, q, k, v) -> Attention:
        """Of the queries `first` to `last` of a sequence to all keys that they may see."""
        sinks = None
        if cell.sinks:
            sinks = sinks_of(cell.heads, q.device, torch.float32)[heads]
        keys = slice(None), slice(begin, begin + last), slice(head, head + 1)
        return Attention(
            q[None, begin + first : begin + last, heads],
            k[None][keys],
            v[None][keys],
            cell.head_dim**-0.5,
            cell.causal,
            first,
            last,
            window_size=cell.window_size,
            sinks=sinks,
        )


class PackedReference(_Sampled):
    """Some query rows in fp64."""

    def _add(self, cell, begin, end, heads, head, *inputs):
        count = min(SAMPLED_ROWS, end - begin)
        places = torch.linspace(0, end - begin - count, SAMPLES).round().long().unique()
        for first in places.tolist():
            exact = self._attention(cell, begin, first, first + count, heads, head, *inputs)
            rows = slice(begin + first, begin + first + count), heads
            self._parts.append((0, rows, exact.out[0], exact.out_allowed()[0]))

    def error(self, out):
        return super().error((out,))

    def rmse(self, out):
        return super().rmse((out,))


class PackedGradientReference(_Sampled):
    """The gradients of the last tokens in fp64: no query but theirs sees their keys."""

    def _add(self, cell, begin, end, heads, head, *inputs):
        *qkv, grad_out = inputs
        length = end - begin
        count = length if length <= WHOLE else LAST_ROWS
        exact = self._attention(cell, begin, length - count, length, heads, head, *qkv)
        grads = exact.gradients(grad_out[None, end - count : end, heads])
        of_keys = slice(head, head + 1)
        for index, (of_heads, (right, allowed)) in enumerate(
            zip((heads, of_keys, of_keys), grads, strict=True)
        ):
            place = slice(end - count, end), of_heads
            self._parts.append((index, place, right[0, -count:], allowed[0, -count:]))
