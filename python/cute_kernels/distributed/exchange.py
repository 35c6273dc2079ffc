"""Messages between ranks, beside the kernels.

Every message of a step is handed over at once (`batch_isend_irecv`): NCCL sends and receives on a
stream of its own, which waits for what the current stream held by then, and `Pending.wait` has the
current stream wait for it. The host waits for nothing. A tensor is kept until its message is done:
by `Pending`, and where the step is waited for by the order of the current stream.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

# How many multiprocessors NCCL may take for messages; the kernels beside them leave these alone.
COMMUNICATION_CTAS = int(os.environ.get("CUTE_KERNELS_COMMUNICATION_CTAS", "8"))

Message = tuple[int, Tensor]  # the other's rank in the group, and what is sent or filled

_channels: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()
_agreed: WeakKeyDictionary[ProcessGroup, set[Any]] = WeakKeyDictionary()


class Ranks(NamedTuple):
    """This process among those that share a sequence."""

    group: ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: ProcessGroup) -> Ranks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))


class Pending(NamedTuple):
    """Messages under way."""

    works: Sequence[Any]
    tensors: Sequence[Tensor]

    def wait(self) -> None:
        """What the current stream gets from now on finds the messages done. Raises the process
        group's error if they failed."""
        for work in self.works:
            work.wait()

    @property
    def margin(self) -> int:
        """The kernels' sm_margin while they are under way."""
        return COMMUNICATION_CTAS if self.works and self.tensors[0].is_cuda else 0


def exchange(ranks: Ranks, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
    """Starts messages: contiguous tensors, several between the same two in the same order on both
    sides."""
    messages: list[tuple[Any, int, Tensor]] = [(dist.isend, *message) for message in sends]
    messages += [(dist.irecv, *message) for message in receives]
    messages = [message for message in messages if message[2].numel() > 0]
    if not messages:
        return Pending((), ())
    channel = channel_of(ranks.group, messages[0][2].device)
    members = dist.get_process_group_ranks(ranks.group)
    works = dist.batch_isend_irecv(
        [dist.P2POp(way, tensor, members[peer], channel) for way, peer, tensor in messages]
    )
    return Pending(works, [tensor for _, _, tensor in messages])


def channel_of(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Where messages of a group go. NCCL has a communicator for them, made by the first call: of
    few multiprocessors, on a stream of high priority, beside the group's own collectives. A graph
    of CUDA can be captured from the second call on."""
    if device.type != "cuda" or "nccl" not in dist.get_backend(group):
        return group
    if group not in _channels:
        _channels[group] = _new_channel(group)
        # Of a batch of messages, NCCL expects all ranks unless there was a collective before.
        dist.all_reduce(torch.zeros(1, device=device), group=_channels[group])
    return _channels[group]


def _new_channel(group: ProcessGroup) -> ProcessGroup:
    # PyTorch names the new group after how many a process has: without the same name on all ranks,
    # they would wait for each other.
    counts: list[Any] = [None] * dist.get_world_size(group)
    world: Any = getattr(distributed_c10d, "_world", None)
    dist.all_gather_object(counts, len(getattr(world, "pg_names", ())), group=group)
    if len(set(counts)) > 1:
        return group
    options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = COMMUNICATION_CTAS
    members = sorted(dist.get_process_group_ranks(group))
    channel = dist.new_group(
        members, backend="nccl", pg_options=options, use_local_synchronization=True
    )
    return cast(ProcessGroup, channel)


def agree(ranks: Ranks, call: dict[str, Any]) -> None:
    """Raises ValueError on every rank if the ranks' calls differ where they must not.

    The ranks compare notes only in calls that are new to a rank, which waits for them all: where
    one rank alone has a new call, it waits until the group's timeout.
    """
    key = tuple(call.values())
    known = _agreed.setdefault(ranks.group, set())
    if key in known or ranks.size == 1:
        return
    calls: list[Any] = [None] * ranks.size
    dist.all_gather_object(calls, call, group=ranks.group)
    for name, value in call.items():
        given = [other.get(name) for other in calls]
        if any(other != value for other in given):
            by_rank = ", ".join(f"{other} on rank {rank}" for rank, other in enumerate(given))
            raise ValueError(f"{name} must be the same on all ranks, but is {by_rank}")
    known.add(key)
