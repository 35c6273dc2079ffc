"""The operators' gradients outside of compilers.

The autograd that register_autograd gives an operator is written in Python and costs a small call
tens of microseconds. Compilers need it; other calls have a cheaper node, which torch.func's
transforms take too, and save what Python costs a call of an operator's object: on a GPU a small
call is host time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_kernels.checks import (
    NO_FORWARD_MODE,
    check_softmax_scale,
    explain,
    outside_compilers,
    refuse_tangents,
)
from cute_kernels.operators import (
    DENSE,
    VARLEN,
    Family,
    Pass,
    backward_inputs,
    by_position,
    gradients_of_inputs,
    refuse_second_derivative,
    save_for_backward,
)
from cute_kernels.torch_private import (
    apply_outside_transforms,
    below_autograd,
    direct,
    in_forward_mode,
    in_transform,
    is_functional,
)

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, ...]]


class Calls(NamedTuple):
    """The ways to call a family's operators; all take the same inputs, by position."""

    without_gradient: Forward
    with_gradient: Forward
    in_transform: Forward
    compiled: Forward
    backward_without_gradient: Backward

    def choose(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None,
        sinks: Tensor | None = None,
    ) -> tuple[Forward, float]:
        """The way to call forward here and now, and softmax_scale or its default.

        Raises AttributeError, IndexError or ZeroDivisionError where `check_forward` has a better
        error.
        """
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** -0.5
        elif isinstance(softmax_scale, Tensor):  # the operator would read it, and wait for a GPU
            check_softmax_scale(softmax_scale)
        needs_grad = _is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (sinks is not None and sinks.requires_grad)
        )
        if in_transform():
            return self.in_transform, softmax_scale
        if in_forward_mode():
            refuse_tangents(q, k, v, sinks)
        if _is_compiling():
            return self.compiled, softmax_scale
        return self.with_gradient if needs_grad else self.without_gradient, softmax_scale


def run_below_autograd(
    of_pass: Pass, keywords: tuple[str, ...], compiled: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """An operator past its autograd; of what it refuses, the exact error. `compiled` is called in
    its place while compilers trace."""
    run, positional, check = direct(of_pass.operator), of_pass.positional, of_pass.check

    def call(*inputs: Any) -> Any:
        if compiled is not None and _is_compiling():
            return compiled(*inputs)
        try:
            with below_autograd():
                if len(inputs) <= positional:
                    return run(*inputs)
                # In one frame, and without `strict=`: of a small call these are 5% each.
                given = zip(keywords, inputs[positional:])  # noqa: B905
                return run(*inputs[:positional], **dict(given))
        except RuntimeError:
            explain(check, *inputs)
            raise

    return call


def _calls(family: Family) -> Calls:
    forward_without_gradient, backward_without_gradient = (
        run_below_autograd(of_pass, family.keywords)
        for of_pass in (family.forward, family.backward)
    )
    compiled_forward, compiled_backward = (
        by_position(of_pass.operator, of_pass.positional, family.keywords)
        for of_pass in (family.forward, family.backward)
    )

    class FlashAttention(torch.autograd.Function):
        """The forward operator: output and LSE."""

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
            output: tuple[Tensor, Tensor] = forward_without_gradient(*inputs)
            return output

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            save_for_backward(family, ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = backward_inputs(family, ctx, *grads)
            compiling = _is_compiling()
            if in_transform() or (_is_grad_enabled() and not compiling):
                results = gradient_with_rules(*inputs)
            elif compiling:
                results = compiled_backward(*inputs)
            else:
                if in_forward_mode():
                    refuse_tangents(*inputs)
                results = backward_without_gradient(*inputs)
            return gradients_of_inputs(family, ctx, results)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> None:
            raise NotImplementedError(NO_FORWARD_MODE)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            return vmap_forward(info, in_dims, *inputs)

    class FlashAttentionGradient(torch.autograd.Function):
        """The backward operator where someone might differentiate or map over it."""

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = backward_without_gradient(*inputs)
            return grads

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Tensor | None) -> None:
            refuse_second_derivative(family)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> None:
            raise NotImplementedError(NO_FORWARD_MODE)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            return vmap_backward(info, in_dims, *inputs)

    forward_with_rules: Forward = FlashAttention.apply
    gradient_with_rules: Backward = FlashAttentionGradient.apply
    vmap_forward, vmap_backward = (
        family.vmap_rule(call, of_pass.check, of_pass.sinks)
        for call, of_pass in (
            (forward_with_rules, family.forward),
            (gradient_with_rules, family.backward),
        )
    )

    @outside_compilers
    def forward_in_transform(*inputs: Any) -> tuple[Tensor, Tensor]:
        """The forward operator with its gradient where transforms of torch.func surround the call.

        Compilers may not look inside: torch 2.13's takes the operator out of the node and drops the
        rules, with them the error of `jvp`.
        """
        if is_functional(inputs[0]):
            output: tuple[Tensor, Tensor] = compiled_forward(*inputs)
            return output
        return forward_with_rules(*inputs)

    return Calls(
        forward_without_gradient,
        apply_outside_transforms(FlashAttention),
        forward_in_transform,
        compiled_forward,
        backward_without_gradient,
    )


dense = _calls(DENSE)
varlen = _calls(VARLEN)
