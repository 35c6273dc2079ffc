"""Attention with the heads spread over ranks: from a part of the sequence for all heads to the
whole of it for some, and back.

Between, any attention will do: each head has all of its keys, and its sink.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cute_kernels.distributed.exchange import Ranks, agree
from cute_kernels.distributed.layouts import part_of, whole_of
from cute_kernels.distributed.operators import group_of
from cute_kernels.operators import NAMESPACE

_NAME = f"{NAMESPACE}::all_to_all_rows"
torch.library.define(
    _NAME,
    "(Tensor x, str group, bool is_call=False, str layout='', float softmax_scale=1.0, "
    "bool causal=False, SymInt? left=None, SymInt? right=None, float softcap=0.0) -> Tensor",
)
_all_to_all = getattr(torch.ops, NAMESPACE).all_to_all_rows.default


def _exchange(x: Tensor, group: str, is_call: bool = False, *call: Any) -> Tensor:
    """`call`: what must be the same on all ranks beside the shape, if it `is_call`."""
    x = x.contiguous()
    ranks = Ranks.of(group_of(group))
    if is_call:
        rows, *others = x.shape[1:]
        agree(
            ranks,
            {
                "the number of rows": rows,
                "the batch with the channels of q, k and v for each rank": tuple(others),
                "the dtype": x.dtype,
                "the layout, softmax_scale, causal, both sides of the window and softcap": call,
            },
        )
    result = torch.empty_like(x)
    dist.all_to_all_single(result, x, group=ranks.group)
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group, ctx.inputs = inputs[1], len(inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _all_to_all(grad, ctx.group), *[None] * (ctx.inputs - 1)


for _device in ("cpu", "cuda"):
    torch.library.impl(_NAME, _device, _exchange)
torch.library.register_fake(_NAME, lambda x, *_: x.new_empty(x.shape))
torch.library.register_autograd(_NAME, _gradient, setup_context=_setup_context)


def check_heads(q: Tensor, k: Tensor, ranks: int) -> None:
    """Raises ValueError unless the heads can be spread over so many ranks."""
    heads = {"q": q.shape[-2], "k": k.shape[-2]}
    if any(count % ranks for count in heads.values()):
        fits = [n for n in range(1, heads["k"] + 1) if all(x % n == 0 for x in heads.values())]
        name, count = next((name, n) for name, n in heads.items() if n % ranks)
        raise ValueError(
            f"{name} has {count} heads, which {ranks} ranks cannot share evenly: of "
            f"{heads['q']} query and {heads['k']} key heads {' or '.join(map(str, fits))} ranks "
            "can; for more ranks, use a mesh of (ring, heads)"
        )


def to_heads(
    q: Tensor, k: Tensor, v: Tensor, call: tuple[Any, ...], group: str, ranks: int, layout: str
) -> tuple[Tensor, ...]:
    """This rank's rows, (batch, rows, heads, head_dim), to all ranks' rows of its share of the
    heads, (batch, rows * ranks, heads / ranks, head_dim), in the order of the sequence; or the same
    without batch. One message goes to each rank, and the results are views of what comes. `call`:
    what must be the same on all ranks beside the layout, as the operator has it."""
    parts = [torch.unflatten(_rows_first(x), -2, (ranks, -1)).flatten(-2) for x in (q, k, v)]
    sizes = [x.shape[-1] for x in parts]
    # (rows, batch, ranks, channels) to (ranks, rows, batch, channels)
    received = _all_to_all(torch.cat(parts, dim=-1).movedim(-2, 0), group, True, layout, *call)
    if layout == "contiguous":
        rows = received.flatten(0, 1)
    else:
        rows = whole_of(received.unbind(0), 0, layout)
    return tuple(
        _rows_first(torch.unflatten(y, -1, (-1, x.shape[-1])))
        for x, y in zip((q, k, v), torch.split(rows, sizes, dim=-1), strict=True)
    )


def from_heads(out: Tensor, group: str, ranks: int, layout: str) -> Tensor:
    """The way back, of the output."""
    rows = _rows_first(out)
    if layout == "contiguous":
        sent = torch.unflatten(rows, 0, (ranks, -1))
    else:
        sent = torch.stack([part_of(rows, 0, layout, rank, ranks) for rank in range(ranks)])
    # (ranks, rows, batch, heads / ranks, head_dim) to (rows, batch, heads, head_dim)
    received = _all_to_all(sent, group).movedim(0, -3).flatten(-3, -2)
    return _rows_first(received).contiguous()


def lse_from_heads(lse: Tensor, group: str, ranks: int, layout: str) -> Tensor:
    """The same for (batch, heads / ranks, rows * ranks), or without batch."""
    return from_heads(lse.mT[..., None], group, ranks, layout)[..., 0].mT.contiguous()


def sinks_of_heads(sinks: Tensor | None, ranks: Ranks) -> Tensor | None:
    return None if sinks is None else sinks.chunk(ranks.size)[ranks.rank]


def _rows_first(x: Tensor) -> Tensor:
    """A view of (rows, batch, ...), and of that one of (batch, rows, ...); packed tensors have
    their rows first."""
    return x.transpose(0, 1) if x.dim() == 4 else x
