"""The names of PyTorch that are not public, all of them.

Each saves a call some microseconds, which on a GPU is what a small call consists of. Where PyTorch
no longer has one, what stands here in its place is public and right, only slower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

# A context in which operators do not look for a gradient to record. It is entered only where there
# is none, so that nothing is lost without it but the time to find that out.
below_autograd: Callable[[], Any] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext
)


def _unknown() -> bool:
    """For questions whose answer may be true without need: outside of compilers, which would not
    look further."""
    return not torch.compiler.is_compiling()


_transforms_active: Callable[[], bool] | None = getattr(
    torch._C, "_are_functorch_transforms_active", None
)

# Whether torch.func's transforms (grad, vmap, ...) surround the call, or may.
in_transform: Callable[[], bool] = _transforms_active or _unknown

# The same; False if that is not known. Then grad's tensors still require a gradient, and jvp's have
# tangents.
surely_in_transform: Callable[[], bool] = _transforms_active or (lambda: False)

# Whether a tensor is one of torch.func.functionalize; False if that is not known.
is_functional: Callable[[Any], bool] = getattr(torch, "_is_functional_tensor", lambda _: False)


def _has_level() -> bool:
    return forward_ad._current_level >= 0


# Whether tensors have tangents, or may.
in_forward_mode = _has_level if hasattr(forward_ad, "_current_level") else _unknown


def is_exporting() -> bool:
    """Whether torch.export traces. The public question is answered with True inside of
    torch.compile, too, before torch 2.13."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def surely(condition: Any) -> bool:
    """Whether it is true. While compilers trace, a number that a program reads from a tensor has no
    value: of that nothing is sure."""
    if torch.compiler.is_compiling() or not isinstance(condition, bool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # loads the compiler

        return guard_or_false(condition)
    return condition


def called_while_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compilers take its result for a constant, as with `torch.compiler.assume_constant_result`,
    which loads the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def direct(operator: Any) -> Callable[..., Any]:
    """What calls an operator without its Python object."""
    function: Callable[..., Any] = getattr(operator, "_op", operator)
    return function


def apply_outside_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, for calls that torch.func's transforms do not surround: without looking
    for them and without matching arguments with the names of forward's."""
    base = getattr(torch._C, "_FunctionBase", None)
    if base is None or "apply" not in vars(base):
        return function.apply
    apply: Callable[..., Any] = vars(base)["apply"].__get__(None, function)
    return apply


def has_cuda_kernel(operator: Any) -> bool:
    """Whether an operator is compiled for CUDA, or may be."""
    is_registered: Callable[[str, str], bool] | None = getattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", None
    )
    return is_registered is None or is_registered(operator.name(), "CUDA")
