"""The operators of context parallelism: one call of one rank, for autograd and compilers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

import cute_kernels.extension  # noqa: F401  the namespace
from cute_kernels import reference
from cute_kernels.distributed.calls import Options, Saved
from cute_kernels.distributed.checks import check_shard, documents_of
from cute_kernels.distributed.exchange import Ranks, agree, watch
from cute_kernels.distributed.gather import gather_backward, gather_forward
from cute_kernels.distributed.layouts import check_tokens
from cute_kernels.distributed.plan import Problem
from cute_kernels.distributed.ring import ring_backward, ring_forward
from cute_kernels.operators import NAMESPACE

_FORMS = {
    "ring": (ring_forward, ring_backward),
    "all_gather": (gather_forward, gather_backward),
}
_FORWARD = f"{NAMESPACE}::context_attention_forward"
_BACKWARD = f"{NAMESPACE}::context_attention_backward"
_CALL = (
    "str group, str form, str layout, float softmax_scale, int? left, int? right, float softcap, "
    "bool deterministic"
)
torch.library.define(
    _FORWARD,
    f"(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, "
    f"{_CALL}) -> (Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? sinks, "
    f"Tensor? cu_seqlens, Tensor out, Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)",
)
context_attention = getattr(torch.ops, NAMESPACE).context_attention_forward.default
_backward = getattr(torch.ops, NAMESPACE).context_attention_backward.default
_c10d: Any = distributed_c10d


def group_of(name: str) -> ProcessGroup:
    """The group of a name: operators take no others."""
    group: ProcessGroup = _c10d._resolve_process_group(name)
    return group


class Call(NamedTuple):
    """What the operators take behind tensors."""

    group: str
    form: str
    layout: str
    softmax_scale: float
    left: int | None
    right: int | None
    softcap: float
    deterministic: bool

    def check(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        check_shard(
            q,
            k,
            v,
            self.softmax_scale,
            False,
            self.left,
            self.right,
            self.softcap,
            self.deterministic,
            sinks,
            cu_seqlens is not None,
        )

    def problem(self, ranks: Ranks, q: Tensor, cu_seqlens: Tensor | None) -> Problem:
        tokens = q.shape[-3] * ranks.size
        check_tokens(tokens, self.layout, ranks.size)
        documents = (0, tokens) if cu_seqlens is None else documents_of(cu_seqlens, tokens)
        return Problem(self.layout, ranks.size, tokens, documents, self.left, self.right)

    @property
    def options(self) -> Options:
        return Options(self.softmax_scale, self.softcap, self.deterministic)


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    *inputs: Any,
) -> tuple[Tensor, Tensor]:
    call = Call(*inputs)
    call.check(q, k, v, sinks, cu_seqlens)
    ranks = Ranks.of(group_of(call.group))
    problem = call.problem(ranks, q, cu_seqlens)
    agree(
        ranks,
        {
            "the function": call.form,
            "layout": call.layout,
            "the shape of q": tuple(q.shape),
            "the shape of k": tuple(k.shape),
            "the shape of v": tuple(v.shape),
            "the dtype": q.dtype,
            "cu_seqlens": problem.documents,
            "softmax_scale": call.softmax_scale,
            "causal with window_size, as (left, right),": (call.left, call.right),
            "softcap": call.softcap,
        },
    )
    with torch.autocast(q.device.type, enabled=False):
        results = _FORMS[call.form][0](problem, ranks, q, k, v, call.options, sinks)
    watch(ranks, q.device)
    return results


def _run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*inputs)
    ranks = Ranks.of(group_of(call.group))
    # Of a sum, a gradient has strides of 0.
    saved = Saved(grad_out.contiguous(), grad_lse, q, out, lse)
    with torch.autocast(q.device.type, enabled=False):
        backward = _FORMS[call.form][1]
        grads = backward(call.problem(ranks, q, cu_seqlens), ranks, saved, k, v, call.options)
        of_sinks = _sinks_gradient(saved, sinks)
    watch(ranks, q.device)
    return *grads, of_sinks


def _sinks_gradient(saved: Saved, sinks: Tensor | None) -> Tensor:
    """(heads,): of rows alone, so that no exchange has a part in it."""
    lse = saved.lse
    if sinks is None:
        return lse.new_empty(0)
    delta = (saved.grad_out.to(lse.dtype) * saved.out.to(lse.dtype)).sum(-1).mT
    if saved.grad_lse is not None:
        delta = delta - saved.grad_lse
    # Rows of no document have an LSE of -inf, and no part in this.
    share = (sinks.to(lse.dtype)[:, None] - lse).exp().masked_fill(lse == -torch.inf, 0.0)
    terms = share * delta
    return -terms.sum([dim for dim in range(terms.dim()) if dim != terms.dim() - 2])


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    *inputs: Any,
) -> tuple[Tensor, Tensor]:
    Call(*inputs).check(q, k, v, sinks, cu_seqlens)
    return reference.empty_outputs(q, v)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_sinks = lse.new_empty(0 if sinks is None else sinks.shape[0])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), of_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.call = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.set_materialize_grads(False)  # an LSE that nobody uses costs nothing


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sinks, cu_seqlens, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    tensors = (grad_out, grad_lse, q, k, v, sinks, cu_seqlens, out, lse)
    *grads, of_sinks = _backward(*tensors, *ctx.call)
    of_sinks = None if sinks is None else of_sinks.to(sinks.dtype)
    return *grads, of_sinks, None, *(None for _ in ctx.call)


def _refuse_second_derivative(*_: Any) -> None:
    raise NotImplementedError("attention over several ranks has no second derivative")


for _device in ("cpu", "cuda"):
    torch.library.impl(_FORWARD, _device, _run_forward)
    torch.library.impl(_BACKWARD, _device, _run_backward)
torch.library.register_fake(_FORWARD, _forward_fake)
torch.library.register_fake(_BACKWARD, _backward_fake)
torch.library.register_autograd(_FORWARD, _gradient, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, _refuse_second_derivative)
