"""The operators' gradients outside of compilers.

The autograd that register_autograd gives an operator is written in Python and costs a small call
tens of microseconds. Compilers need it; other calls have a cheaper node, which torch.func's
transforms take too, and save what Python costs a call of an operator's object: on a GPU a small
call is host time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_kernels.checks import (
    NO_FORWARD_MODE,
    check_backward,
    check_forward,
    explain,
    outside_compilers,
    refuse_tangents,
)
from cute_kernels.compat import (
    apply_outside_transforms,
    below_autograd,
    direct,
    in_forward_mode,
    in_transform,
    is_functional,
)
from cute_kernels.operators import (
    backward_inputs,
    flash_attn_backward,
    flash_attn_forward,
    refuse_second_derivative,
    save_for_backward,
)
from cute_kernels.vmap import fold_into_batch

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_run_forward, _run_backward = direct(flash_attn_forward), direct(flash_attn_backward)


def forward_without_gradient(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The forward operator past its autograd; of what it refuses, the exact error."""
    try:
        with below_autograd():
            output: tuple[Tensor, Tensor] = _run_forward(*inputs)
        return output
    except RuntimeError as refusal:
        explain(refusal, check_forward, *inputs)


def backward_without_gradient(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator past its autograd; of what it refuses, the exact error."""
    try:
        with below_autograd():
            grads: tuple[Tensor, Tensor, Tensor] = _run_backward(*inputs)
        return grads
    except RuntimeError as refusal:
        explain(refusal, check_backward, *inputs)


class FlashAttention(torch.autograd.Function):
    """The forward operator: output and LSE."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return forward_without_gradient(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = backward_inputs(ctx, *grads)
        compiling = _is_compiling()
        if in_transform() or (_is_grad_enabled() and not compiling):
            results = _gradient_with_rules(*inputs)
        elif compiling:
            results = flash_attn_backward(*inputs)
        else:
            if in_forward_mode():
                refuse_tangents(*inputs[:7])
            results = backward_without_gradient(*inputs)
        return (*results, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _vmap_forward(info, in_dims, *inputs)


class FlashAttentionGradient(torch.autograd.Function):
    """The backward operator where someone might differentiate or map over it."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backward_without_gradient(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        refuse_second_derivative(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _vmap_backward(info, in_dims, *inputs)


_forward_with_rules: Callable[..., tuple[Tensor, Tensor]] = FlashAttention.apply
_gradient_with_rules: Callable[..., tuple[Tensor, ...]] = FlashAttentionGradient.apply
_vmap_forward = fold_into_batch(_forward_with_rules, check_forward)
_vmap_backward = fold_into_batch(_gradient_with_rules, check_backward)

forward_with_gradient = apply_outside_transforms(FlashAttention)


@outside_compilers
def forward_in_transform(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The forward operator with its gradient where transforms of torch.func surround the call.

    Compilers may not look inside: torch 2.13's takes the operator out of the node and drops the
    rules, with them the error of `jvp`.
    """
    if is_functional(inputs[0]):
        output: tuple[Tensor, Tensor] = flash_attn_forward(*inputs)
        return output
    return _forward_with_rules(*inputs)
