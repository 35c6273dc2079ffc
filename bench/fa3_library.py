"""FlashAttention-3 as a library of operators, without the package around it: the build inside
xformers, which has the forward and the backward pass."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VARIABLE = "CUTE_KERNELS_FA3_LIBRARY"
HOW_TO_GET = (
    f"--fa3-library PATH or {VARIABLE} names it: xformers/flash_attn_3/_C.so of "
    "`python -m pip download --no-deps xformers==0.0.34`, with libcudart.so.12 of the package "
    "nvidia-cuda-runtime-cu12 in the same folder"
)
CUDA_RUNTIME = "libcudart.so.12"
ONE_IN_A_PROCESS = (
    "another FlashAttention-3 has registered the operators flash_attn_3 already: of the peers fa3 "
    "and fa3-xformers name one"
)


def registered() -> bool:
    """Whether some library has registered the operators; a second one would end the process."""
    import torch

    return hasattr(torch.ops.flash_attn_3, "fwd")


@cache
def load(path: Path):
    """The operators fwd and bwd of the library.

    Raises:
        OSError: it is not there or does not load.
        RuntimeError: another library has registered operators of the same names.
    """
    import torch

    if registered():
        raise RuntimeError(ONE_IN_A_PROCESS)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    beside = path.parent / CUDA_RUNTIME
    ctypes.CDLL(str(beside) if beside.exists() else CUDA_RUNTIME, mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(path.resolve()))
    if not registered():
        raise OSError(f"{path} has no operators flash_attn_3")
    return torch.ops.flash_attn_3


def attention(operators, **of_backward: object) -> Callable[..., torch.Tensor]:
    """q, k, v and a dict of options of both operators -> the output, differentiable by the
    library's own backward operator, which alone gets `of_backward`."""

    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, options):
            options = {"softmax_scale": q.shape[-1] ** -0.5, **options}
            out, lse, *_ = operators.fwd(q, k, v, **options)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.options = {**options, **of_backward}
            return out

        @staticmethod
        def backward(ctx, grad_out):
            grads = operators.bwd(grad_out, *ctx.saved_tensors, **ctx.options)
            return *grads[:3], None

    return Attention.apply
