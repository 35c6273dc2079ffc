"""Messages between GPUs of one host by their copy engines, into memory that all of them have mapped
(PyTorch's symmetric memory).

A rank writes its rows to where the receiver's kernels read them, on a stream of its own, and then
the number of the exchange to a flag there; the receiver's stream waits for that number, and when it
has read the rows writes it to a flag at every other rank, whose next messages to the same place
wait for it. No multiprocessor has a part in any of that, nor the host.

Ranks do the same exchanges in the same order: so they agree on numbers and places without a word.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from cute_kernels.distributed.exchange import Post

# How many exchanges of a kind may be there at once: the keys of a step are read while those of the
# next arrive, and gradients are added before the next are sent.
_SLOTS = {"keys": 2, "gradients": 1}
_ALIGNMENT = 256
_ARRIVED, _RELEASED = range(2)


class Arena:
    """Memory for arrivals of a kind, on every rank of the group: slots of two halves."""

    def __init__(self, slots: int):
        self.slots = slots
        self.half_bytes = 0
        self.of_ranks: list[Tensor] = []
        self.owner: Any = None  # what the memory lives by
        self.exchanges = 0  # so far

    def half(self, rank: int, number: int, which: int) -> Tensor:
        """Bytes of keys (0) or of values (1) of an exchange on a rank."""
        start = (number % self.slots * 2 + which) * self.half_bytes
        return self.of_ranks[rank][start : start + self.half_bytes]


class Copier:
    """The copy engines between the ranks of a group."""

    def __init__(self, group: ProcessGroup, device: torch.device, gpu: Gpu | None = None):
        self.group, self.gpu = group, gpu or Gpu(group, device)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.watched = torch.zeros(1, device=device)
        self._arenas = {kind: Arena(slots) for kind, slots in _SLOTS.items()}
        numbers = len(_SLOTS) * 2 * self.size
        flags, self._owner_of_flags = self.gpu.allocate(4 * numbers)
        self._flags = [x.view(torch.int32).view(len(_SLOTS), 2, self.size) for x in flags]
        self._flags[self.rank].zero_()
        self.gpu.settle()

    def start(self, post: Post) -> CopiedArrival:
        arena = self._arenas[post.kind]
        self._reserve(arena, post.most_bytes)
        number = arena.exchanges
        arena.exchanges += 1
        peers = sorted({delivery.peer for delivery in post.deliveries})
        with self.gpu.beside():
            for peer in peers:
                # What was there one round of slots ago is read.
                released = self._flag(self.rank, post.kind, _RELEASED, peer)
                self.gpu.wait(released, number - arena.slots + 1)
            for peer, rows, place in post.deliveries:
                for which, x in enumerate(rows):
                    row_bytes = x[:1].nbytes
                    half = arena.half(peer, number, which)
                    target = half[place * row_bytes : place * row_bytes + x.nbytes]
                    target.view(x.dtype).view(x.shape).copy_(x, non_blocking=True)
            for peer in peers:
                self.gpu.write(self._flag(peer, post.kind, _ARRIVED, self.rank), number + 1)
            sent = self.gpu.mark()
        return CopiedArrival(self, post, arena, number, sent)

    def arrived(self, post: Post, number: int) -> None:
        """Has the current stream wait for an exchange."""
        for peer in sorted({peer for peer, _ in post.expected}):
            self.gpu.wait(self._flag(self.rank, post.kind, _ARRIVED, peer), number + 1)

    def release(self, kind: str, number: int) -> None:
        for peer in range(self.size):
            if peer != self.rank:
                self.gpu.write(self._flag(peer, kind, _RELEASED, self.rank), number + 1)

    def _flag(self, at: int, kind: str, which: int, of: int) -> Tensor:
        return self._flags[at][list(_SLOTS).index(kind), which, of]

    def _reserve(self, arena: Arena, most_bytes: int) -> None:
        """All ranks come here with the same number of bytes. Rare: it waits for the GPUs."""
        if most_bytes <= arena.half_bytes:
            return
        self.gpu.settle()  # nobody reads or writes what goes now
        arena.of_ranks, arena.owner = [], None
        arena.half_bytes = most_bytes + -most_bytes % _ALIGNMENT
        arena.of_ranks, arena.owner = self.gpu.allocate(2 * arena.slots * arena.half_bytes)
        self.gpu.settle()


class CopiedArrival:
    """What others' copy engines write: an `exchange.Arrival`."""

    margin = 0  # no multiprocessor has a part in it

    def __init__(self, copier: Copier, post: Post, arena: Arena, number: int, sent: Any):
        self._copier, self._post, self._number, self._sent = copier, post, number, sent
        self.k, self.v = (
            self._rows(arena.half(copier.rank, number, which), x)
            for which, x in enumerate(post.like)
        )

    def wait(self) -> None:
        self._copier.arrived(self._post, self._number)
        self._copier.gpu.wait_for(self._sent)

    def release(self) -> None:
        self._copier.release(self._post.kind, self._number)

    def _rows(self, half: Tensor, like: Tensor) -> Tensor:
        from cute_kernels.distributed.exchange import as_call, row_shape

        shape = (self._post.rows, *row_shape(like))
        size = torch.Size(shape).numel() * self._post.dtype.itemsize
        return as_call(half[:size].view(self._post.dtype).view(shape))


class Gpu:
    """The current GPU: memory that others have mapped, flags in it, and a stream beside."""

    def __init__(self, group: ProcessGroup, device: torch.device):
        self._group, self._device = group, device
        self._driver = _driver()
        self._stream: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def allocate(self, number_of_bytes: int) -> tuple[list[Tensor], Any]:
        """The same on all ranks: bytes of each rank, as mapped here, and what they live by."""
        memory: Any = _symmetric_memory()
        own = memory.empty(number_of_bytes, dtype=torch.uint8, device=self._device)
        handle = memory.rendezvous(own, self._group)
        of_ranks = [
            handle.get_buffer(rank, (number_of_bytes,), torch.uint8)
            for rank in range(dist.get_world_size(self._group))
        ]
        return of_ranks, (own, handle)  # buffers own nothing

    def settle(self) -> None:
        """All GPUs have done all that they have got."""
        torch.cuda.synchronize(self._device)
        dist.barrier(self._group)

    def beside(self) -> AbstractContextManager[Any]:
        """The stream of messages, behind what the current stream holds."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def mark(self) -> Any:
        return self._stream.record_event()

    def wait_for(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def write(self, flag: Tensor, value: int) -> None:
        """In the order of the current stream, behind all that it wrote before."""
        self._call(self._driver.cuStreamWriteValue32_v2, flag, value)

    def wait(self, flag: Tensor, value: int) -> None:
        """Has the current stream wait until the flag is no less."""
        if value > 0:
            self._call(self._driver.cuStreamWaitValue32_v2, flag, value)

    def _call(self, function: Any, flag: Tensor, value: int) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        code = function(
            ctypes.c_void_p(stream),
            ctypes.c_uint64(flag.data_ptr()),
            ctypes.c_uint32(value & 0xFFFFFFFF),
            ctypes.c_uint(0),
        )
        if code != 0:
            raise RuntimeError(f"the driver refused a flag of a message with error {code}")


def copies_reach(group: ProcessGroup, device: torch.device) -> bool:
    """Whether copy engines reach all ranks of a group, the same answer on all of them."""
    if dist.get_world_size(group) == 1:
        return False
    wanted = os.environ.get("CUTE_KERNELS_COPY_ENGINE", "1") != "0"
    able = wanted and _driver() is not None and _symmetric_memory() is not None
    host = _host() if able else None
    hosts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(hosts, host, group=group)
    if None in hosts or len(set(hosts)) > 1:
        return False
    try:
        Gpu(group, device).allocate(_ALIGNMENT)
        mapped = True
    except RuntimeError:  # not all GPUs see each other
        mapped = False
    dist.all_gather_object(hosts, mapped, group=group)
    return all(hosts)


def _host() -> str:
    """The same for processes of one machine only."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return os.uname().nodename


def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return driver if hasattr(driver, "cuStreamWaitValue32_v2") else None
    except OSError:
        return None


def _symmetric_memory() -> Any:
    try:
        import torch.distributed._symmetric_memory as memory
    except ImportError:
        return None
    return memory if hasattr(memory, "rendezvous") and hasattr(memory, "empty") else None
