"""The registered operators: everything about them that is not compiled.

The extension defines ``flash_attn_forward`` and ``flash_attn_backward`` with their CUDA
implementations; here are their CPU implementations, shape inference, gradients and vmap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cute_kernels.extension  # noqa: F401  defines the operators
from cute_kernels import reference
from cute_kernels.checks import check_backward, check_forward
from cute_kernels.tiles import tile_configs
from cute_kernels.vmap import fold_into_batch

NAMESPACE = "cute_kernels"
FORWARD = f"{NAMESPACE}::flash_attn_forward"
BACKWARD = f"{NAMESPACE}::flash_attn_backward"

# Looked up once: torch.ops.x.y costs a call more.
flash_attn_forward = getattr(torch.ops, NAMESPACE).flash_attn_forward.default
flash_attn_backward = getattr(torch.ops, NAMESPACE).flash_attn_backward.default


@torch.library.impl(FORWARD, "cpu")
def _forward_cpu(*inputs: Any) -> tuple[Tensor, Tensor]:
    check_forward(*inputs)
    q, k, v, softmax_scale, causal, *_ = inputs
    with torch.autocast("cpu", enabled=False):
        return reference.attention_forward(q, k, v, softmax_scale, causal)


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    check_forward(*inputs)
    return reference.empty_outputs(inputs[0])


@torch.library.impl(BACKWARD, "cpu")
def _backward_cpu(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(*inputs)
    arguments = inputs[:9]  # without deterministic and tile_config
    with torch.autocast("cpu", enabled=False):
        return reference.attention_backward(*arguments)


def _backward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(*inputs)
    _, _, q, k, v, *_ = inputs
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward_not_built(*_: Any) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError(
        "this build has no kernels for the gradient of flash_attn_func on CUDA: call it under "
        "torch.no_grad() or on tensors that need no gradient, or on the CPU"
    )


if not tile_configs("backward"):
    torch.library.impl(BACKWARD, "cuda", _backward_not_built)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # an LSE that nobody uses costs nothing


def backward_inputs(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    softmax_scale, causal, _, deterministic = ctx.options
    return grad_out, grad_lse, q, k, v, out, lse, softmax_scale, causal, deterministic, None


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*flash_attn_backward(*backward_inputs(ctx, *grads)), None, None, None, None)


def refuse_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError("flash_attn_func has no second derivative")


torch.library.register_fake(FORWARD, _forward_fake)
torch.library.register_fake(BACKWARD, _backward_fake)
torch.library.register_autograd(FORWARD, _backward, setup_context=save_for_backward)
torch.library.register_autograd(BACKWARD, refuse_second_derivative)
torch.library.register_vmap(FORWARD, fold_into_batch(flash_attn_forward, check_forward))
torch.library.register_vmap(BACKWARD, fold_into_batch(flash_attn_backward, check_backward))
