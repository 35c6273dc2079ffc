"""What a call of the operators of this folder may look like, see cute_kernels/checks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import (
    DENSE,
    HEAD_DIM_MULTIPLE,
    PACKED,
    check_device,
    check_flag,
    check_tensor,
    check_vectors,
)
from cute_kernels.reference import accumulator_dtype

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROWS_LIMIT = 2**31


def check_merge(
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raises ValueError or TypeError unless the merge operator can answer this call."""
    check_tensor("out", out)
    if out.dim() not in (len(DENSE), len(PACKED)):
        raise ValueError(
            f"out has shape {tuple(out.shape)}, must be ({', '.join(DENSE)}) or "
            f"({', '.join(PACKED)})"
        )
    if out.shape[-1] % HEAD_DIM_MULTIPLE != 0:
        raise ValueError(
            f"out has head_dim {out.shape[-1]}, must have a multiple of {HEAD_DIM_MULTIPLE}"
        )
    rows = out.shape[:-1].numel()
    if isinstance(rows, int) and rows >= _ROWS_LIMIT:
        raise ValueError(f"out has shape {tuple(out.shape)}, must have fewer than 2^31 rows")
    for name, x in (("out", out), ("part_out", part_out)):
        check_device(name, x, out, "out")
        _check_dtype(f"{name} has dtype", x.dtype, out)
        if x.shape != out.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, must be {tuple(out.shape)} like out"
            )
        _check_last_dimension(name, x)
    *batch, seqlen, heads, _ = out.shape
    shape, dtype = (*batch, heads, seqlen), accumulator_dtype(out.dtype)
    for name, x in (("lse", lse), ("part_lse", part_lse)):
        check_device(name, x, out, "out")
        if x.dtype != dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, must be {dtype}")
        if x.shape != shape:
            names = "batch, heads, seqlen" if batch else "heads, total"
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must be ({names}) = {shape}")
    if out_dtype is not None:
        _check_dtype("out_dtype is", out_dtype, out)


def _check_last_dimension(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name} has strides {x.stride()}, its last dimension (head_dim) must be contiguous "
            "(stride 1)"
        )


def _check_dtype(what: str, dtype: object, out: Tensor) -> None:
    if dtype not in _DTYPES and not (dtype == torch.float64 and out.device.type == "cpu"):
        raise TypeError(f"{what} {dtype}, must be float32, float16 or bfloat16")


def check_merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """The same of the operator that writes its results to out and lse."""
    check_merge(out, lse, part_out, part_lse)


def check_gradients(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    add_to_q: bool,
    add_to_kv: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    """Raises ValueError or TypeError unless gradients of q, k and v can be written to these."""
    check_flag("add_to_q", add_to_q)
    check_flag("add_to_kv", add_to_kv)
    dtype = accumulator_dtype(q.dtype)
    for name, grad, x in (("q", grad_q, q), ("k", grad_k, k), ("v", grad_v, v)):
        check_device(f"grad_{name}", grad, q)
        if grad.dtype != dtype:
            raise TypeError(f"grad_{name} has dtype {grad.dtype}, must be {dtype}")
        if grad.shape != x.shape:
            raise ValueError(
                f"grad_{name} has shape {tuple(grad.shape)}, must be {tuple(x.shape)} like {name}"
            )
        _check_last_dimension(f"grad_{name}", grad)
        check_vectors(f"grad_{name}", grad)
