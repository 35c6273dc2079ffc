"""The registered operators: everything about them that is not compiled.

The extension defines two families, each of a forward and a backward operator with its CUDA
implementation: ``flash_attn_*`` and ``flash_attn_varlen_*``. Here are their CPU implementations,
shape inference, gradients and vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cute_kernels.extension  # noqa: F401  defines the operators
from cute_kernels import reference
from cute_kernels.checks import check_backward, check_forward
from cute_kernels.tiles import tile_configs
from cute_kernels.varlen_checks import (
    check_varlen_backward,
    check_varlen_forward,
    rows_of_sequences,
)
from cute_kernels.vmap import Rule, fold_into_batch, refuse_vmap

NAMESPACE = "cute_kernels"

# Looked up once: torch.ops.x.y costs a call more.
_operators = getattr(torch.ops, NAMESPACE)
flash_attn_forward = _operators.flash_attn_forward.default
flash_attn_heads_first = _operators.flash_attn_heads_first.default
flash_attn_backward = _operators.flash_attn_backward.default
flash_attn_varlen_forward = _operators.flash_attn_varlen_forward.default
flash_attn_varlen_backward = _operators.flash_attn_varlen_backward.default


class Pass(NamedTuple):
    """One operator."""

    operator: Any
    check: Callable[..., None]  # raises unless the operator can answer a call
    positional: int  # how many of its inputs are not keyword-only

    @property
    def sinks(self) -> int:
        """Which of its inputs they are."""
        return self.positional - 1


class Family(NamedTuple):
    """A forward and a backward operator, and what the package knows of both.

    In the package inputs go by position: those that are keyword-only to an operator come last, in
    the order of its schema.
    """

    function: str  # the public one
    forward: Pass
    backward: Pass
    tensors: int  # the first inputs of forward: q, k, v and lengths
    keywords: tuple[str, ...]  # the keyword-only inputs of both
    # softmax_scale and what follows it: as backward takes it, from what forward was given
    backward_options: Callable[..., tuple[Any, ...]]
    vmap_rule: Callable[[Callable[..., Any], Callable[..., None], int], Rule]


_VARLEN_KEYWORDS = (
    "max_seqlen_q",
    "max_seqlen_k",
    "window_left",
    "window_right",
    "deterministic",
    "tile_config",
    "softcap",
    "sm_margin",
)


def _dense_options(
    softmax_scale: float,
    causal: bool,
    _: str | None,
    deterministic: bool,
    sinks: Tensor | None = None,
    *keywords: Any,
) -> tuple[Any, ...]:
    return softmax_scale, causal, deterministic, None, sinks, *keywords


def _varlen_options(*options: Any) -> tuple[Any, ...]:
    before = 3 + _VARLEN_KEYWORDS.index("tile_config")
    if len(options) <= before:
        return options
    return *options[:before], None, *options[before + 1 :]  # forward's is not backward's


DENSE = Family(
    function="flash_attn_func",
    forward=Pass(flash_attn_forward, check_forward, 8),
    backward=Pass(flash_attn_backward, check_backward, 12),
    tensors=3,
    keywords=("window_left", "window_right", "diagonal", "softcap", "sm_margin"),
    backward_options=_dense_options,
    vmap_rule=fold_into_batch,
)
VARLEN = Family(
    function="flash_attn_varlen_func",
    forward=Pass(flash_attn_varlen_forward, check_varlen_forward, 11),
    backward=Pass(flash_attn_varlen_backward, check_varlen_backward, 15),
    tensors=8,
    keywords=_VARLEN_KEYWORDS,
    backward_options=_varlen_options,
    vmap_rule=refuse_vmap,
)


def by_position(
    operator: Callable[..., Any], positional: int, keywords: tuple[str, ...]
) -> Callable[..., Any]:
    """What calls an operator with its keyword-only inputs, if given, by position."""

    def call(*inputs: Any) -> Any:
        given = inputs[positional:]
        return operator(*inputs[:positional], **dict(zip(keywords, given, strict=False)))

    return call


# Gradients


def save_for_backward(
    family: Family, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    at = family.forward.sinks
    ctx.options = list(inputs[family.tensors :])
    sinks = None
    if len(inputs) > at:
        sinks, ctx.options[at - family.tensors] = inputs[at], None
    ctx.sinks_dtype = None if sinks is None else sinks.dtype
    ctx.save_for_backward(*inputs[: family.tensors], sinks, *output)
    ctx.set_materialize_grads(False)  # an LSE that nobody uses costs nothing


def backward_inputs(
    family: Family, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    q, k, v, *lengths, sinks, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    options = list(ctx.options)
    if sinks is not None:
        options[family.forward.sinks - family.tensors] = sinks
    backward_options = family.backward_options(*options)
    return grad_out, grad_lse, q, k, v, out, lse, *lengths, *backward_options


def gradients_of_inputs(family: Family, ctx: Any, grads: Any) -> tuple[Tensor | None, ...]:
    """Of q, k, v and the sinks, and None for each other input of forward."""
    *of_qkv, of_sinks = grads
    others: list[Tensor | None] = [None] * (family.tensors - 3 + len(ctx.options))
    if ctx.sinks_dtype is not None:
        others[family.forward.sinks - 3] = of_sinks.sum(0).to(ctx.sinks_dtype)
    return *of_qkv, *others


def refuse_second_derivative(family: Family) -> None:
    raise NotImplementedError(f"{family.function} has no second derivative")


# The CPU's implementations


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    tile_config: str | None = None,
    deterministic: bool = False,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    sm_margin: int = 0,
    **mask: Any,
) -> tuple[Tensor, Tensor]:
    of_call = softmax_scale, reference.mask_of(causal, **mask), sinks, softcap
    return reference.attention_forward(q, k, v, *of_call)


def _heads_first_cpu(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = flash_attn_forward(*tensors, softmax_scale, causal)
    return out.transpose(1, 2), lse


def backward_cpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    tile_config: str | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    sm_margin: int = 0,
    grad_dtype: torch.dtype | None = None,
    **mask: Any,
) -> reference.Gradients:
    tensors = (grad_out, grad_lse, q, k, v, out, lse)
    of_call = softmax_scale, reference.mask_of(causal, **mask), sinks, softcap
    return reference.attention_backward(*tensors, *of_call, grad_dtype)


def _varlen_forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    diagonal: Tensor | None,
    softmax_scale: float,
    causal: bool,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal)
    sequences, mask = packed_sequences(q, k, lengths, causal, **options)
    return reference.packed_forward(q, k, v, sequences, softmax_scale, mask, sinks, softcap)


def varlen_backward_cpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    diagonal: Tensor | None,
    softmax_scale: float,
    causal: bool,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    grad_dtype: torch.dtype | None = None,
    **options: Any,
) -> reference.Gradients:
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal)
    sequences, mask = packed_sequences(q, k, lengths, causal, **options)
    tensors = (grad_out, grad_lse, q, k, v, out, lse)
    of_call = sequences, softmax_scale, mask, sinks, softcap
    return reference.packed_backward(*tensors, *of_call, grad_dtype)


def packed_sequences(
    q: Tensor,
    k: Tensor,
    lengths: tuple[Any, ...],
    causal: bool,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    **_: Any,
) -> tuple[list[reference.Sequence], reference.Mask]:
    """The sequences and the mask of a varlen call."""
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal = lengths
    queries = rows_of_sequences("q", q, cu_seqlens_q, seqused_q, max_seqlen_q)
    keys = rows_of_sequences("k", k, cu_seqlens_k, seqused_k, max_seqlen_k)
    known = diagonal is not None and not diagonal.is_meta
    diagonals = diagonal.tolist() if known else [None] * len(keys)
    sequences = [reference.Sequence(*one) for one in zip(queries, keys, diagonals, strict=True)]
    return sequences, reference.mask_of(causal, window_left, window_right)


# Registration


def _register(
    of_pass: Pass,
    family: Family,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:
    def checked_cpu(*inputs: Any, **keywords: Any) -> Any:
        of_pass.check(*inputs, **keywords)
        with torch.autocast("cpu", enabled=False):
            return cpu(*inputs, **keywords)

    def checked_fake(*inputs: Any, **keywords: Any) -> Any:
        of_pass.check(*inputs, **keywords)
        return fake(*inputs)

    name = of_pass.operator.name()
    torch.library.impl(name, "cpu", checked_cpu)
    torch.library.register_fake(name, checked_fake)
    torch.library.register_autograd(name, gradient, setup_context=setup_context)
    rule = family.vmap_rule(of_pass.operator, of_pass.check, of_pass.sinks)
    torch.library.register_vmap(name, rule)


def _register_family(
    family: Family, forward_cpu: Callable[..., Any], backward_cpu: Callable[..., Any]
) -> None:
    backward, positional = family.backward.operator, family.backward.positional
    run_backward = by_position(backward, positional, family.keywords)

    def forward_fake(q: Tensor, _: Tensor, v: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
        return reference.empty_outputs(q, v)

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        save_for_backward(family, ctx, (*inputs, *keyword_only_inputs.values()), output)

    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        results = run_backward(*backward_inputs(family, ctx, *grads))
        # PyTorch 2.14 counts: inputs that are keyword-only have none.
        return gradients_of_inputs(family, ctx, results)[: family.forward.positional]

    def backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
        q, k, v = inputs[2:5]
        sinks = inputs[family.backward.sinks] if len(inputs) > family.backward.sinks else None
        of_sinks = reference.empty_sinks_gradient(q, sinks)
        return *(x.new_empty(x.shape) for x in (q, k, v)), of_sinks

    def second_derivative(*_: Any) -> None:
        refuse_second_derivative(family)

    _register(family.forward, family, forward_cpu, forward_fake, gradient, setup_context)
    _register(family.backward, family, backward_cpu, backward_fake, second_derivative)


def _backward_not_built(*_: Any, **__: Any) -> reference.Gradients:
    raise NotImplementedError(
        "this build has no kernels for gradients on CUDA: call attention under "
        "torch.no_grad() or on tensors that need no gradient, or on the CPU"
    )


torch.library.impl(flash_attn_heads_first.name(), "cpu", _heads_first_cpu)
_register_family(DENSE, _forward_cpu, backward_cpu)
_register_family(VARLEN, _varlen_forward_cpu, varlen_backward_cpu)
if not tile_configs("backward"):
    for _family in (DENSE, VARLEN):
        torch.library.impl(_family.backward.operator.name(), "cuda", _backward_not_built)
