"""Messages between ranks, beside the kernels: rows of keys and values, or of their gradients.

Where all ranks of a group are GPUs of one host that have each other's memory mapped, and
``CUTE_KERNELS_COPY_ENGINE=0`` does not forbid it, copy engines write them to where they are read,
and leave the multiprocessors to the kernels: see `copies`. Else they go by the process group, all
of a step at once (`batch_isend_irecv`); NCCL has a stream of its own for them, which waits for what
the current stream held by then. Either way `Arrival.wait` has the current stream wait, and the host
waits for nothing.
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

from cute_kernels.distributed.copies import Copier, copies_reach
from cute_kernels.distributed.plan import Interval

# How many multiprocessors NCCL may take for messages; the kernels beside them leave these alone.
COMMUNICATION_CTAS = int(os.environ.get("CUTE_KERNELS_COMMUNICATION_CTAS", "8"))

_channels: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()
_watchers: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()
_copiers: WeakKeyDictionary[ProcessGroup, Copier | None] = WeakKeyDictionary()
_agreed: WeakKeyDictionary[ProcessGroup, set[Any]] = WeakKeyDictionary()


class Ranks(NamedTuple):
    """This process among those that share a sequence."""

    group: ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: ProcessGroup) -> Ranks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]


class Delivery(NamedTuple):
    """Rows for another rank."""

    peer: int
    rows: tuple[Tensor, Tensor]  # of keys and of values, contiguous
    place: int  # from which row on they lie there


class Post(NamedTuple):
    """One exchange of a step, in which any rank may send to and receive from any."""

    kind: str  # "keys" or "gradients"
    deliveries: Sequence[Delivery]
    expected: Sequence[tuple[int, Interval]]  # from whom which rows come
    like: tuple[Tensor, Tensor]  # what arrives has the shape of these, as calls take them, but
    rows: int  # as many rows
    most_bytes: int  # of the rows of keys, or of those of values, on any rank, in any exchange
    dtype: torch.dtype


class Arrival:
    """What others send. Everything is kept until it is there and gone."""

    def __init__(self, works: Sequence[Any], post: Post, k: Tensor, v: Tensor):
        self.k, self.v = as_call(k), as_call(v)
        self._works, self._post = works, post

    def wait(self) -> None:
        """What the current stream gets from now on finds all rows there, and its own sent. Raises
        the process group's error if a message failed."""
        for work in self._works:
            work.wait()

    def release(self) -> None:
        """Of what the current stream has got by now, nothing after it reads the rows."""

    @property
    def margin(self) -> int:
        """The kernels' sm_margin while messages are under way."""
        return COMMUNICATION_CTAS if self._works and self.k.is_cuda else 0


def exchange(ranks: Ranks, post: Post) -> Any:
    """Starts messages. All ranks of the group must, in the same order, even those that have none;
    and must wait for and release the exchanges of a kind in that order, each before the second
    that follows it. Returns an Arrival."""
    copier = copier_of(ranks, post.like[0].device)
    if copier is not None:
        return copier.start(post)
    k, v = (empty_rows(x, post.rows, post.dtype) for x in post.like)
    sends = [(dist.isend, peer, x) for peer, rows, _ in post.deliveries for x in rows]
    receives = [(dist.irecv, peer, x[a:b]) for peer, (a, b) in post.expected for x in (k, v)]
    messages: list[tuple[Any, int, Tensor]] = [*sends, *receives]
    messages = [message for message in messages if message[2].numel() > 0]
    works: Sequence[Any] = ()
    if messages:
        channel = channel_of(ranks.group, k.device)
        members = dist.get_process_group_ranks(ranks.group)
        works = dist.batch_isend_irecv(
            [dist.P2POp(way, tensor, members[peer], channel) for way, peer, tensor in messages]
        )
    return Arrival(works, post, k, v)


def rows_first(x: Tensor) -> Tensor:
    """(rows, batch, heads, head_dim) or (rows, heads, head_dim), contiguous, so that some rows are
    one message."""
    return (x.transpose(0, 1) if x.dim() == 4 else x).contiguous()


def as_call(x: Tensor) -> Tensor:
    """The inverse of `rows_first`, a view."""
    return x.transpose(0, 1) if x.dim() == 4 else x


def row_shape(like: Tensor) -> tuple[int, ...]:
    """Of a row as `rows_first` has it."""
    return (*(like.shape[:1] if like.dim() == 4 else ()), *like.shape[-2:])


def empty_rows(like: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """As `rows_first` has them."""
    return like.new_empty((rows, *row_shape(like)), dtype=dtype)


def bytes_of(like: Sequence[Tensor], rows: int, dtype: torch.dtype) -> int:
    """Of so many rows, of keys or of values: the larger."""
    sizes = [torch.Size(row_shape(x)).numel() for x in like]
    return rows * max(sizes) * dtype.itemsize


def watch(ranks: Ranks, device: torch.device) -> None:
    """To be called behind a call's last exchange. Copy engines that wait for a rank which is gone
    would wait forever: a collective behind them has NCCL's watchdog see that, and end the process.
    It is one of this rank alone, in which no multiprocessor waits for others."""
    copier = copier_of(ranks, device)
    if copier is not None:
        watcher = _watcher_of(ranks.group, device)
        dist.all_reduce(copier.watched, group=watcher, async_op=True)


def copier_of(ranks: Ranks, device: torch.device) -> Copier | None:
    """The copy engines between the GPUs of a group; None if they do not reach all of them. What a
    graph replays has no numbers of its own, by which ranks know what is there: then, too."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    if ranks.group not in _copiers:
        reach = copies_reach(ranks.group, device)
        _copiers[ranks.group] = Copier(ranks.group, device) if reach else None
        if reach:
            channel_of(ranks.group, device)  # for graphs, while none is captured
    return _copiers[ranks.group]


def channel_of(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Where messages of a group go. NCCL has a communicator for them, made by the first call: of
    few multiprocessors, on a stream of high priority, beside the group's own collectives. A graph
    of CUDA can be captured from the second call on."""
    if device.type != "cuda" or not is_nccl(group, device):
        return group
    if group not in _channels:
        _channels[group] = _new_channel(group, device)
        # Of a batch of messages, NCCL expects all ranks unless there was a collective before.
        dist.all_reduce(torch.zeros(1, device=device), group=_channels[group])
    return _channels[group]


def is_nccl(group: ProcessGroup, device: torch.device) -> bool:
    """Whether NCCL carries a group's messages between such devices. A group whose maker named no
    backend (a DeviceMesh that began it) has one for each kind of device, and no name."""
    if "nccl" in dist.get_backend(group):
        return True
    try:
        own: Any = cast(Any, group)._get_backend(device)
        return "nccl" in own.name().lower()
    except (AttributeError, RuntimeError):  # there is none for such devices
        return False


def _new_channel(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    # PyTorch names the new group after how many a process has: without the same name on all ranks,
    # they would wait for each other.
    counts: list[Any] = [None] * dist.get_world_size(group)
    world: Any = getattr(distributed_c10d, "_world", None)
    dist.all_gather_object(counts, len(getattr(world, "pg_names", ())), group=group)
    if len(set(counts)) > 1:
        return group
    options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = COMMUNICATION_CTAS
    return _new_group(group, device, sorted(dist.get_process_group_ranks(group)), options)


def _watcher_of(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    if not is_nccl(group, device):
        return group
    if group not in _watchers:
        _watchers[group] = _new_group(group, device, [dist.get_rank()])
    return _watchers[group]


def _new_group(
    group: ProcessGroup, device: torch.device, members: list[int], options: Any = None
) -> ProcessGroup:
    """With the group's timeout, which new ones do not have by themselves."""
    own: Any = getattr(group, "_get_backend", lambda _: None)(device)
    timeout = getattr(getattr(own, "options", None), "_timeout", None)
    if options is not None and timeout is not None:
        options._timeout = timeout
    made = dist.new_group(
        members,
        timeout=timeout,
        backend="nccl",
        pg_options=options,
        use_local_synchronization=True,
    )
    return cast(ProcessGroup, made)


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
