"""What a call of the varlen operators may look like, see checks.py."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cute_kernels.checks import (
    PACKED,
    check_call,
    check_device,
    check_int,
    check_results,
    check_sm_margin,
    check_window,
)
from cute_kernels.tile_checks import check_tile_config


def check_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    diagonal: Tensor | None,
    softmax_scale: float,
    causal: bool,
    sinks: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    deterministic: bool = False,
    tile_config: str | None = None,
    softcap: float = 0.0,
    sm_margin: int = 0,
) -> None:
    """Raises ValueError or TypeError unless the varlen forward operator can answer this call. The
    contents of tensors are left to `rows_of_sequences`."""
    check_call(q, k, v, PACKED, softmax_scale, causal, deterministic, sinks, softcap)
    check_lengths(q, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal)
    check_max_seqlens(max_seqlen_q, max_seqlen_k)
    check_window(window_left, window_right)
    check_sm_margin(sm_margin)
    check_tile_config(tile_config, "forward", q, v, True, softcap > 0)


def check_varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    diagonal: Tensor | None,
    softmax_scale: float,
    causal: bool,
    sinks: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    deterministic: bool = False,
    tile_config: str | None = None,
    softcap: float = 0.0,
    sm_margin: int = 0,
) -> None:
    """The same for the varlen backward operator."""
    check_call(q, k, v, PACKED, softmax_scale, causal, deterministic, sinks, softcap)
    check_results(q, v, PACKED, out, grad_out, lse, grad_lse)
    check_lengths(q, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal)
    check_max_seqlens(max_seqlen_q, max_seqlen_k)
    check_window(window_left, window_right)
    check_sm_margin(sm_margin)
    check_tile_config(tile_config, "backward", q, v, True, softcap > 0)


def check_max_seqlens(max_seqlen_q: int | None, max_seqlen_k: int | None) -> None:
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        check_int(name, longest, least=0)


def check_lengths(
    q: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    diagonal: Tensor | None,
) -> None:
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_int32(name, starts, q)
        if starts.shape[0] == 0:
            raise ValueError(f"{name} has shape (0,), must be (batch + 1,)")
    slots = cu_seqlens_q.shape[0]
    if cu_seqlens_k.shape[0] != slots:
        raise ValueError(
            f"cu_seqlens_k has shape ({cu_seqlens_k.shape[0]},), must be ({slots},) like "
            "cu_seqlens_q"
        )
    of_batch = (("seqused_q", seqused_q), ("seqused_k", seqused_k), ("diagonal", diagonal))
    for name, values in of_batch:
        if values is None:
            continue
        check_int32(name, values, q)
        if values.shape[0] != slots - 1:
            raise ValueError(
                f"{name} has shape ({values.shape[0]},), must be (batch,) = ({slots - 1},)"
            )


def check_int32(name: str, tensor: Tensor, q: Tensor, dims: int = 1, like: str = "q") -> None:
    """Numbers on the device of q, a tensor whose name is `like`."""
    check_device(name, tensor, q, like)
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {tensor.dtype}, must be torch.int32")
    if tensor.dim() != dims:
        dimensions = "1 dimension" if dims == 1 else f"{dims} dimensions"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must have {dimensions}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)}, must be contiguous (stride 1)")


def rows_of_sequences(
    which: str, x: Tensor, cu_seqlens: Tensor, seqused: Tensor | None, longest: int | None
) -> list[slice]:
    """The rows that each sequence uses, read on the host: on a GPU this waits for it. Meta tensors
    have shapes only, for which it does not matter that the first sequence uses all rows.

    Args:
        which: "q", "k" or "k_new", for messages.
        x: that tensor.
        cu_seqlens, seqused, longest: its cu_seqlens, seqused and max_seqlen.

    Raises:
        ValueError: a sequence is not a part of the tensor, or longer than max_seqlen.
    """
    if cu_seqlens.is_meta:
        return [slice(0, 0 if i else x.shape[0]) for i in range(cu_seqlens.shape[0] - 1)]
    name, starts = f"cu_seqlens_{which}", cu_seqlens.tolist()
    if starts[0] != 0:
        raise ValueError(f"{name}[0] is {starts[0]}, must be 0")
    slots = list(itertools.pairwise(starts))
    for i, (start, stop) in enumerate(slots):
        if stop < start:
            raise ValueError(f"{name}[{i + 1}] is {stop}, must be at least {name}[{i}] = {start}")
    if starts[-1] > x.shape[0]:
        raise ValueError(
            f"{name}[{len(slots)}] is {starts[-1]}, must be at most {x.shape[0]}, the rows of "
            f"{which.removesuffix('_new')}"
        )
    rows = []
    counts = [stop - start for start, stop in slots] if seqused is None else seqused.tolist()
    for i, (count, (start, stop)) in enumerate(zip(counts, slots, strict=True)):
        if not 0 <= count <= stop - start:
            raise ValueError(
                f"seqused_{which}[{i}] is {count}, must be from 0 to {stop - start}, the rows from "
                f"{name}[{i}] to {name}[{i + 1}]"
            )
        if longest is not None and count > longest:
            raise ValueError(
                f"max_seqlen_{which} is {longest}, must be at least {count}, the rows that "
                f"sequence {i} uses"
            )
        rows.append(slice(start, start + count))
    return rows


def check_contents(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    """Raises ValueError as `rows_of_sequences` of q and of k."""
    rows_of_sequences("q", q, cu_seqlens_q, seqused_q, max_seqlen_q)
    rows_of_sequences("k", k, cu_seqlens_k, seqused_k, max_seqlen_k)
