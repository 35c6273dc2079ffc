"""What the GPUs of a group do in a second, for the cost model."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cute_kernels.distributed.checks import Group, groups_of
from cute_kernels.distributed.cost import H100, Machine
from cute_kernels.distributed.exchange import (
    COMMUNICATION_CTAS,
    Delivery,
    Post,
    Ranks,
    copier_of,
    exchange,
    is_nccl,
)
from cute_kernels.interface import flash_attn_func

_REPEATS = 5


def measure(
    group: Group = None,
    tokens: int = 16384,
    heads: int = 16,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Machine:
    """Times attention on one GPU, and messages between ranks, all at once; of each the slowest.

    All ranks of the group must call it; it takes a second or two, and waits for the GPUs. Ranks of
    one host are taken to follow one another.

    Args:
        group: as of `ring_attn_func`.
        tokens, heads, head_dim, dtype: of the attention that is timed, with a causal mask; of the
            messages, which are as large as its keys and values.
    """
    (of_ranks,) = groups_of(group)
    ranks = Ranks.of(of_ranks)
    device = torch.device("cuda")
    if not (torch.cuda.is_available() and is_nccl(of_ranks, device)):
        device = torch.device("cpu")
    q, k, v, grad = torch.randn(4, 1, tokens, heads, head_dim, device=device).to(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> None:
        with torch.no_grad():
            flash_attn_func(q, k, v, causal=True)

    def both() -> None:
        out = flash_attn_func(q, k, v, causal=True)
        torch.autograd.grad(out, leaves, grad)

    operations = 2 * tokens * tokens * heads * head_dim
    one = _seconds(forward, ranks, device)
    two = _seconds(both, ranks, device)
    hosts: list[Any] = [None] * ranks.size
    dist.all_gather_object(hosts, os.uname().nodename, group=of_ranks)
    node = max(hosts.count(host) for host in hosts)
    machine = dataclasses.replace(
        H100,
        forward=operations / one,
        backward=2.5 * operations / max(two - one, one / 10),
        node=node,
    )
    size = 2 * k.nbytes
    if node > 1:
        link = size / _seconds(lambda: _send(ranks, 1, k, v), ranks, device)
        margin = COMMUNICATION_CTAS if copier_of(ranks, device) is None else 0
        machine = dataclasses.replace(machine, link=link, messages=margin)
    if node < ranks.size:
        between = size / _seconds(lambda: _send(ranks, node, k, v), ranks, device)
        machine = dataclasses.replace(machine, between=between)
    return machine


def _send(ranks: Ranks, distance: int, k: Tensor, v: Tensor) -> None:
    """To the rank so far behind; as much comes from the rank so far before."""
    rows = k.shape[1]
    sends = [Delivery((ranks.rank + distance) % ranks.size, (k.detach()[0], v.detach()[0]), 0)]
    expected = [((ranks.rank - distance) % ranks.size, (0, rows))]
    arrival = exchange(ranks, Post("keys", sends, expected, (k, v), rows, k.nbytes, k.dtype))
    arrival.wait()
    arrival.release()


def _seconds(call: Callable[[], None], ranks: Ranks, device: torch.device) -> float:
    """Of the slowest rank, the median of a few after a first one."""
    times = []
    for _ in range(1 + _REPEATS):
        _settle(device)
        dist.barrier(ranks.group)
        begin = time.perf_counter()
        call()
        _settle(device)
        times.append(time.perf_counter() - begin)
    slowest = torch.tensor(statistics.median(times[1:]), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=ranks.group)
    return slowest.item()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
