"""The registered operators: everything about them that is not compiled.

The extension defines ``flash_attn_forward`` and its CUDA implementation; here are its CPU
implementation, its shape inference, and its gradient as an operator of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cute_kernels.extension  # noqa: F401  defines the forward operator
from cute_kernels import reference
from cute_kernels.checks import check_forward

NAMESPACE = "cute_kernels"
FORWARD = f"{NAMESPACE}::flash_attn_forward"
BACKWARD = f"{NAMESPACE}::flash_attn_backward"

torch.library.define(
    BACKWARD,
    "(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float softmax_scale, bool causal) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
)


@torch.library.impl(FORWARD, "cpu")
def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, tile_config: int
) -> tuple[Tensor, Tensor]:
    check_forward(q, k, v, softmax_scale, tile_config)
    with torch.autocast("cpu", enabled=False):
        return reference.attention_forward(q, k, v, softmax_scale, causal)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, tile_config: int
) -> tuple[Tensor, Tensor]:
    check_forward(q, k, v, softmax_scale, tile_config)
    return reference.empty_outputs(q)


@torch.library.impl(BACKWARD, "cpu")
def _backward_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        return reference.attention_backward(*arguments)


@torch.library.impl(BACKWARD, "cuda")
def _backward_cuda(*_: Any) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError(
        "the gradient of flash_attn_func on CUDA is not there yet: call it under torch.no_grad() "
        "or on tensors that need no gradient, or on the CPU"
    )


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.softmax_scale, ctx.causal, _ = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = flash_attn_backward(
        grad_out, grad_lse, *ctx.saved_tensors, ctx.softmax_scale, ctx.causal
    )
    return (*grads, None, None, None)


def _backward_of_backward(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError("flash_attn_func has no second derivative")


torch.library.register_fake(FORWARD, _forward_fake)
torch.library.register_fake(BACKWARD, _backward_fake)
torch.library.register_autograd(FORWARD, _backward, setup_context=_save_for_backward)
torch.library.register_autograd(BACKWARD, _backward_of_backward)

# Looked up once: torch.ops.x.y costs a call more.
flash_attn_forward = getattr(torch.ops, NAMESPACE).flash_attn_forward.default
flash_attn_backward = getattr(torch.ops, NAMESPACE).flash_attn_backward.default
