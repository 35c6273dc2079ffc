"""What a call of the operator that combines parts may look like, see cute_kernels/checks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import check_like, check_tensor

PARTS = ("splits", "batch", "seqlen", "heads", "head_dim")

_OUTPUTS = (torch.float32, torch.float16, torch.bfloat16)


def check_combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError or TypeError unless the operator can answer this call."""
    check_tensor("out_partial", out_partial)
    if out_partial.dim() != len(PARTS):
        raise ValueError(
            f"out_partial has shape {tuple(out_partial.shape)}, must have {len(PARTS)} dimensions: "
            f"({', '.join(PARTS)})"
        )
    wide = (torch.float32, torch.float64) if out_partial.device.type == "cpu" else (torch.float32,)
    if out_partial.dtype not in wide:
        raise TypeError(f"out_partial has dtype {out_partial.dtype}, must be torch.float32")
    if out_partial.stride(-1) != 1 and out_partial.shape[-1] > 1:
        raise ValueError(
            f"out_partial has strides {out_partial.stride()}, its last dimension (head_dim) must "
            "be contiguous (stride 1)"
        )
    check_like("lse_partial", lse_partial, out_partial, "out_partial")
    if lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            f"lse_partial has shape {tuple(lse_partial.shape)}, must be ({', '.join(PARTS[:-1])}) "
            f"= {tuple(out_partial.shape[:-1])}"
        )
    allowed = (out_partial.dtype, *_OUTPUTS)
    if out_dtype is not None and out_dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in _OUTPUTS)
        raise TypeError(f"out_dtype is {out_dtype}, must be {names}")
