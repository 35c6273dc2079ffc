"""Operators that have no gradient: everything about them that is not compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cute_kernels.autograd import run_below_autograd
from cute_kernels.operators import Pass, by_position
from cute_kernels.torch_private import has_cuda_kernel

_is_compiling = torch.compiler.is_compiling


def register(
    of_pass: Pass,
    keywords: tuple[str, ...],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    has_autograd: bool = True,
) -> Callable[..., Any]:
    """What calls the operator, with keyword-only inputs by position; of what it refuses it raises
    the exact error. PyTorch has no autograd for an operator that writes its inputs."""
    operator = of_pass.operator
    name = operator.name()

    def checked_cpu(*inputs: Any, **given: Any) -> Any:
        of_pass.check(*inputs, **given)
        with torch.autocast("cpu", enabled=False):
            return cpu(*inputs, **given)

    def checked_fake(*inputs: Any, **given: Any) -> Any:
        of_pass.check(*inputs, **given)
        return fake(*inputs, **given)

    def not_built(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{name} has no CUDA kernel in this build: it answers on the CPU")

    def no_gradient(*_: Any) -> NoReturn:
        raise NotImplementedError(f"{name} has no gradient: call it under torch.no_grad()")

    def no_vmap(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{name} has no rule for torch.func.vmap")

    torch.library.impl(name, "cpu", checked_cpu)
    torch.library.register_fake(name, checked_fake)
    torch.library.register_vmap(name, no_vmap)
    if has_autograd:
        torch.library.register_autograd(name, no_gradient)
    if not has_cuda_kernel(operator):
        torch.library.impl(name, "cuda", not_built)

    compiled = by_position(operator, of_pass.positional, keywords)
    return run_below_autograd(of_pass, keywords, compiled)


def mark_written(*tensors: Tensor | None) -> None:
    """Autograd notices what an operator writes only if it is told; compilers know."""
    if _is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            increment_version(tensor)
