"""The registered operators of this folder: everything about them that is not compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_kernels.operators import (
    DENSE,
    NAMESPACE,
    VARLEN,
    Family,
    Pass,
    backward_cpu,
    varlen_backward_cpu,
)
from cute_kernels.parts import reference
from cute_kernels.parts.checks import check_gradients, check_merge, check_merge_into
from cute_kernels.reference import empty_sinks_gradient
from cute_kernels.registration import register

_operators = getattr(torch.ops, NAMESPACE)
_OWN = 5  # inputs of backward's operators before those of the operators that return gradients


def _merge_fake(
    out: Tensor, lse: Tensor, *_: Tensor, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape, dtype=out_dtype), lse.new_empty(lse.shape)


def _nothing_fake(*_: Tensor) -> None:
    return None


merge = register(
    Pass(_operators.flash_attn_merge.default, check_merge, 4),
    ("out_dtype",),
    reference.merge,
    _merge_fake,
)
merge_ = register(
    Pass(_operators.flash_attn_merge_.default, check_merge_into, 4),
    (),
    reference.merge_,
    _nothing_fake,
    has_autograd=False,
)


def _gradients_into(
    family: Family, operator: Any, backward: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Any]:
    positional = _OWN + family.backward.positional

    def check(*inputs: Any, **keywords: Any) -> None:
        family.backward.check(*inputs[_OWN:], **keywords)
        check_gradients(*inputs[:_OWN], *inputs[_OWN + 2 : _OWN + 5])

    def cpu(
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
        add_to_q: bool,
        add_to_kv: bool,
        *inputs: Any,
        **keywords: Any,
    ) -> Tensor:
        *grads, of_sinks = backward(*inputs, grad_dtype=grad_q.dtype, **keywords)
        adds = (add_to_q, add_to_kv, add_to_kv)
        for given, grad, add in zip((grad_q, grad_k, grad_v), grads, adds, strict=True):
            given.add_(grad) if add else given.copy_(grad)
        return of_sinks

    def fake(*inputs: Any, **_: Any) -> Tensor:
        at = _OWN + family.backward.sinks
        return empty_sinks_gradient(inputs[_OWN + 2], inputs[at] if len(inputs) > at else None)

    return register(
        Pass(operator, check, positional), family.keywords, cpu, fake, has_autograd=False
    )


dense_gradients = _gradients_into(DENSE, _operators.flash_attn_backward_into.default, backward_cpu)
varlen_gradients = _gradients_into(
    VARLEN, _operators.flash_attn_varlen_backward_into.default, varlen_backward_cpu
)
