"""The operators' gradients in eager calls.

The autograd that register_autograd gives an operator is written in Python and costs a small call
tens of microseconds. Compilers need it; eager calls have cheaper ways, which also save what Python
costs a call of an operator's object: on a GPU a small call is host time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_kernels.operators import (
    backward_inputs,
    flash_attn_backward,
    flash_attn_forward,
    save_for_backward,
)
from cute_kernels.tiles import AUTOMATIC, tile_configs

_below_autograd = torch._C._AutoDispatchBelowAutograd
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_run_forward, _run_backward = flash_attn_forward._op, flash_attn_backward._op


def forward_without_gradient(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The forward operator past its autograd."""
    with _below_autograd():
        output: tuple[Tensor, Tensor] = _run_forward(*inputs)
    return output


class _Differentiable(torch.autograd.Function):
    """For every call: a node in Python."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], with_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        with _below_autograd():
            out, lse = _run_forward(q, k, v, *options)
        save_for_backward(ctx, (q, k, v, *options), (out, lse))
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        inputs = backward_inputs(ctx, grad_out, grad_lse)
        # Where grad mode is on, a second derivative is asked for: the operator's autograd refuses.
        if _is_grad_enabled() or _is_compiling():
            return (*flash_attn_backward(*inputs), None, None)
        with _below_autograd():
            return (*_run_backward(*inputs), None, None)


# autograd.Function's own apply looks for functorch's tensors, which the caller has excluded.
_with_python_node: Callable[..., Tensor | tuple[Tensor, Tensor]] = super(
    torch.autograd.Function, _Differentiable
).apply

# For the usual call: ATen's operator for fused attention by others, whose derivative is a node in
# C++. On CUDA it is ours (cute_kernels/torch/autograd_node.cpp), as long as it looks like this.
_ATEN_NAME = "_scaled_dot_product_fused_attention_overrideable"
_ATEN_SCHEMAS = {
    _ATEN_NAME: (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias=None, float dropout_p=0., "
        "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> "
        "(Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
        "SymInt max_k, Tensor philox_seed, Tensor philox_offset, Tensor debug_attn_mask)"
    ),
    f"{_ATEN_NAME}_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor attn_bias, "
        "bool[4] grad_input_mask, Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
        "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
        "Tensor philox_seed, Tensor philox_offset, *, float? scale=None) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_bias)"
    ),
}
_MADE_HERE = 0x63757465  # what our implementation returns as max_q
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN_OPTIONS = (AUTOMATIC, False)  # tile_config, deterministic


def _aten_schema(name: str) -> str | None:
    operator = getattr(torch.ops.aten, name, None)
    return None if operator is None else str(operator.default._schema)


_has_aten_node = bool(tile_configs("backward")) and all(
    _aten_schema(name) == f"aten::{name}{schema}" for name, schema in _ATEN_SCHEMAS.items()
)
_run_aten: Any = getattr(torch.ops.aten, _ATEN_NAME).default._op if _has_aten_node else None


def forward_with_gradient(
    q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], with_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The forward operator with its gradient: the output, and with_lse the LSE."""
    if (
        _has_aten_node
        and not with_lse
        and options[2:] == _PLAIN_OPTIONS
        and type(q) in _PLAIN_TENSORS
        and type(k) in _PLAIN_TENSORS
        and type(v) in _PLAIN_TENSORS
        and q.is_cuda
        and not _dispatch_modes()
    ):
        softmax_scale, causal, *_ = options
        out: Tensor
        out, _, _, _, maker, *_ = _run_aten(q, k, v, None, 0.0, causal, False, scale=softmax_scale)
        if maker == _MADE_HERE:
            return out
    return _with_python_node(q, k, v, options, with_lse)
