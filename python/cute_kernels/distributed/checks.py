"""What a call of context parallelism may look like, on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from cute_kernels.checks import DENSE, PACKED, check_call, check_window

Group = ProcessGroup | DeviceMesh | None


def groups_of(group: Group, dims: Sequence[int] = (1,), name: str = "group") -> list[ProcessGroup]:
    """The process group of each dimension of a mesh, or of what is given instead of one.

    Raises TypeError or ValueError unless it is a group of this process, of all processes if None,
    or a mesh of so many dimensions.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim not in dims:
            allowed = " or ".join(map(str, dims))
            raise ValueError(f"{name} is a mesh of {group.ndim} dimensions, must have {allowed}")
        groups = [group.get_group(dim) for dim in range(group.ndim)]
    elif group is None:
        if not dist.is_initialized():
            raise ValueError(
                f"{name} is None, all processes, but there is no process group: call "
                "torch.distributed.init_process_group first"
            )
        groups = [cast(ProcessGroup, dist.group.WORLD)]
    elif isinstance(group, ProcessGroup):
        groups = [group]
    else:
        raise TypeError(
            f"{name} is a {type(group).__name__}, must be a torch.distributed.ProcessGroup, a "
            "DeviceMesh or None for all processes"
        )
    return groups


def check_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    left: int | None,
    right: int | None,
    softcap: float,
    deterministic: bool,
    sinks: Tensor | None,
    packed: bool,
) -> None:
    """Raises ValueError or TypeError unless they are this rank's part of an attention."""
    layout = PACKED if packed else DENSE
    check_call(q, k, v, layout, softmax_scale, causal, deterministic, sinks, softcap)
    check_window(left, right)
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]}, must be {q.shape[0]} like q")
    if k.shape[-3] != q.shape[-3]:
        raise ValueError(
            f"k has {layout[-3]} {k.shape[-3]}, must be {q.shape[-3]} like q: each rank holds the "
            "queries and the keys of the same tokens"
        )


def starts_of(cu_seqlens: Any) -> Tensor:
    """cu_seqlens as a tensor on the CPU, one of which is itself.

    Raises ValueError or TypeError unless it is that or a list of ints.
    """
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"cu_seqlens is on {cu_seqlens.device}, must be on the CPU, or a list: what is "
                "sent where depends on it, and to read it would wait for the GPU in each layer"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}, "
                "must be (batch + 1,) of torch.int32 or torch.int64"
            )
        return cu_seqlens
    if not isinstance(cu_seqlens, Sequence) or isinstance(cu_seqlens, (str, bytes)):
        raise TypeError(
            f"cu_seqlens is a {type(cu_seqlens).__name__}, must be a list of ints or a tensor on "
            "the CPU"
        )
    for i, start in enumerate(cu_seqlens):
        if not isinstance(start, int):
            raise TypeError(f"cu_seqlens[{i}] is {start!r}, must be an int")
    return torch.tensor(cu_seqlens, dtype=torch.int64, device="cpu")


def documents_of(cu_seqlens: Any, tokens: int) -> tuple[int, ...]:
    """cu_seqlens as numbers of the host.

    Raises ValueError or TypeError unless they say where documents begin among so many tokens.
    """
    starts: list[int] = starts_of(cu_seqlens).tolist()
    if not starts or starts[0] != 0:
        raise ValueError(f"cu_seqlens[0] is {starts[0] if starts else 'not there'}, must be 0")
    for i in range(1, len(starts)):
        if starts[i] < starts[i - 1]:
            raise ValueError(
                f"cu_seqlens[{i}] is {starts[i]}, must be at least cu_seqlens[{i - 1}] = "
                f"{starts[i - 1]}"
            )
    if starts[-1] > tokens:
        raise ValueError(
            f"cu_seqlens[{len(starts) - 1}] is {starts[-1]}, must be at most {tokens}, the tokens "
            "of all ranks"
        )
    return tuple(starts)
