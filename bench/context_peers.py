"""Attention over a sequence that ranks share: ours, and how it is done without this package's.

A form takes this rank's q, k and v, (1, rows, heads, head_dim), and gives the output of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from bench.cells import Cell
from cute_kernels import distributed, flash_attn_func

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """`layout`, `group`: which rows a rank has, as `shard` takes them; `takes`: whether it answers
    a cell on so many ranks."""

    name: str
    layout: str
    attention: Callable[[bool], Attention]
    context: Callable[[], AbstractContextManager] = nullcontext
    takes: Callable[[Cell, int], bool] = lambda cell, ranks: True
    group: Any = None


def ours(meshes: dict[str, dist.DeviceMesh]) -> list[Form]:
    """`meshes`: of two dimensions, (ring, heads), by what to call them."""

    def form(name: str, layout: str, function: Callable, group=None) -> Form:
        shared = dist.get_world_size() if group is None else group.size(1)
        return Form(
            name,
            layout,
            lambda causal: lambda q, k, v: function(q, k, v, group, causal=causal, layout=layout),
            takes=lambda cell, _: (
                function is not distributed.ulysses_attn_func or cell.heads_kv % shared == 0
            ),
            group=group,
        )

    return [
        form("ring", "zigzag", distributed.ring_attn_func),
        form("all-gather", "zigzag", distributed.all_gather_attn_func),
        form("heads", "contiguous", distributed.ulysses_attn_func),
        *(
            form(f"ring and heads, {name}", "zigzag", distributed.ulysses_attn_func, mesh)
            for name, mesh in meshes.items()
        ),
    ]


def peers() -> list[Form]:
    return [
        Form("plain all-gather, our kernel", "zigzag", _plain_all_gather),
        Form(
            "plain all-to-all, our kernel",
            "contiguous",
            _plain_all_to_all,
            takes=lambda cell, ranks: cell.heads_kv % ranks == 0,
        ),
        *(
            Form(
                f"torch, {name}",
                "zigzag",
                _torch,
                lambda backend=backend: _in_torch(backend),
                _is_causal,
            )
            for name, backend in (
                ("cudnn", torch.nn.attention.SDPBackend.CUDNN_ATTENTION),
                ("flash", torch.nn.attention.SDPBackend.FLASH_ATTENTION),
            )
        ),
    ]


def _is_causal(cell: Cell, ranks: int) -> bool:
    """PyTorch balances the load, and then takes no other mask."""
    return cell.causal


class _AllGather(torch.autograd.Function):
    """Rows of all ranks; of its gradient the sum of all ranks', of this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        whole = x.new_empty(dist.get_world_size() * x.shape[1], *x.shape[2:])
        dist.all_gather_into_tensor(whole, x[0].contiguous())
        return whole[None]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        part = grad.new_empty(grad.shape[1] // dist.get_world_size(), *grad.shape[2:])
        dist.reduce_scatter_tensor(part, grad[0].contiguous())
        return part[None]


def _plain_all_gather(causal: bool) -> Attention:
    """Gathers all of K and V, then two calls of the kernel: for each half of the rank's rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.shape[1] // 2
        order = [place for r in range(ranks) for place in (r, 2 * ranks - 1 - r)]
        natural = sorted(range(2 * ranks), key=order.__getitem__)
        k, v = (
            torch.cat([x.split(half, 1)[i] for i in natural], 1)
            for x in (_AllGather.apply(k), _AllGather.apply(v))
        )
        outs = []
        for chunk, rows in zip((rank, 2 * ranks - 1 - rank), q.split(half, 1), strict=True):
            seen = (chunk + 1) * half if causal else k.shape[1]
            outs.append(flash_attn_func(rows, k[:, :seen], v[:, :seen], causal=causal))
        return torch.cat(outs, 1)

    return attention


class _AllToAll(torch.autograd.Function):
    """(1, rows, heads, d) to (1, rows of all, heads / ranks, d), or back."""

    @staticmethod
    def forward(ctx, x: Tensor, to_heads: bool) -> Tensor:
        ctx.to_heads = to_heads
        # (ranks, rows, heads, d) are what the ranks get, and what comes from them.
        sent = x[0].unflatten(1 if to_heads else 0, (dist.get_world_size(), -1))
        sent = (sent.movedim(1, 0) if to_heads else sent).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        received = received if to_heads else received.movedim(0, 1)
        return received.flatten(*((0, 1) if to_heads else (1, 2)))[None]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, not ctx.to_heads), None


def _plain_all_to_all(causal: bool) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_AllToAll.apply(x, True) for x in (q, k, v))
        return _AllToAll.apply(flash_attn_func(q, k, v, causal=causal), False)

    return attention


def _torch(causal: bool) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        return out.transpose(1, 2)

    return attention


@contextmanager
def _in_torch(backend) -> Iterator[None]:
    """PyTorch's own ring, of rows that are cut already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cuda", (ranks,))
    something = torch.zeros(2 * ranks, device="cuda")  # it wants a tensor to cut
    with (
        torch.nn.attention.sdpa_kernel(backend),
        context_parallel(mesh, buffers=[something], buffer_seq_dims=[0]),
    ):
        yield
