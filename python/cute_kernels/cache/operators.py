"""The registered operators of this folder: everything about them that is not compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cute_kernels.autograd import run_below_autograd
from cute_kernels.cache import reference
from cute_kernels.cache.checks import (
    check_append,
    check_attention,
    check_attention_out,
    check_combine,
)
from cute_kernels.cache.eight_bits import output_dtype
from cute_kernels.operators import NAMESPACE, Pass, by_position
from cute_kernels.reference import empty_outputs
from cute_kernels.torch_private import has_cuda_kernel

_operators = getattr(torch.ops, NAMESPACE)
_is_compiling = torch.compiler.is_compiling


def _attention_fake(
    q: Tensor, _: Tensor, v_cache: Tensor, *__: Any, **___: Any
) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v_cache, output_dtype(q))


def _attention_out_fake(_: Tensor, *inputs: Any, **__: Any) -> Tensor:
    return _attention_fake(*inputs)[1]


def _append_fake(*inputs: Any, **_: Any) -> tuple[Tensor, Tensor]:
    k, lengths, q = inputs[2], inputs[4], inputs[12] if len(inputs) > 12 else None
    turned = k.new_empty(0) if q is None else q.new_empty(q.shape)
    return lengths.new_empty(lengths.shape), turned


def _combine_fake(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    _, batch, seqlen, heads, head_dim = out_partial.shape
    out = out_partial.new_empty((batch, seqlen, heads, head_dim), dtype=out_dtype)
    return out, lse_partial.new_empty((batch, heads, seqlen)).transpose(1, 2)


def _register(
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
        raise NotImplementedError(f"{name} is not there yet on CUDA: CPU only so far")

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

    eager = run_below_autograd(of_pass, keywords)
    compiled = by_position(operator, of_pass.positional, keywords)

    def call(*inputs: Any) -> Any:
        return (compiled if _is_compiling() else eager)(*inputs)

    return call


_OPTIONS = (
    "max_seqlen_q",
    "window_left",
    "window_right",
    "softcap",
    "num_splits",
    "rotation_seed",
)
attention = _register(
    Pass(_operators.flash_attn_kvcache_forward.default, check_attention, 15),
    _OPTIONS,
    reference.attention,
    _attention_fake,
)
attention_out = _register(
    Pass(_operators.flash_attn_kvcache_forward_out.default, check_attention_out, 16),
    _OPTIONS,
    reference.attention_out,
    _attention_out_fake,
    has_autograd=False,
)
append = _register(
    Pass(_operators.append_kv.default, check_append, 20),
    (),
    reference.append,
    _append_fake,
    has_autograd=False,
)
combine = _register(
    Pass(_operators.flash_attn_combine.default, check_combine, 2),
    ("out_dtype",),
    reference.combine,
    _combine_fake,
)


def mark_written(*tensors: Tensor | None) -> None:
    """Autograd notices what an operator writes only if it is told; compilers know."""
    if _is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            increment_version(tensor)
