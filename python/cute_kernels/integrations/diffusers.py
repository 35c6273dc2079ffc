"""diffusers' models on this package's kernels: ``model.set_attention_backend("cute_kernels")``.

diffusers has no public way to add a backend: an enum names them, and a registry has their
functions. `register` adds to both, `unregister` takes it out again.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_kernels.fp8 import flash_attn_fp8_func
from cute_kernels.integrations.enums import remove_member
from cute_kernels.interface import flash_attn_func
from cute_kernels.operators import flash_attn_backward, flash_attn_forward
from cute_kernels.varlen import flash_attn_varlen_func

NAME = "cute_kernels"
NAME_FP8 = "cute_kernels_fp8"

# Output (batch, seqlen, heads, head_dim) and LSE (batch, heads, seqlen) of query, key, value,
# is_causal, scale and whether the LSE is wanted, without which it may be None.
Attention = Callable[
    [Tensor, Tensor, Tensor, bool, float | None, bool], tuple[Tensor, Tensor | None]
]


class Backend(NamedTuple):
    """What one of the backends consists of."""

    attention: Attention  # without a mask
    in_ring: bool  # whether it takes ring attention
    native: Callable[..., Any]  # diffusers' own, for what this package does not take
    in_parallel: Callable[..., Any]  # diffusers' context parallelism


# The backend that was active when these came; only `register` and `unregister` change it.
_active_before: Any = None


def register() -> None:
    """Adds two attention backends to diffusers, by names that `model.set_attention_backend` and
    `diffusers.attention_backend` take.

    "cute_kernels" is exact, and has gradients. "cute_kernels_fp8" is `flash_attn_fp8_func`, for
    inference; what that cannot do (masks, a causal mask with lengths that differ) is computed in 16
    bits. Both take context parallelism, the second without ring attention.

    A boolean mask that hides the same keys from all queries of a batch entry (padding) costs a copy
    of k and v, and no wait for the GPU. Dropout and any other mask go on to diffusers' own backend
    "native", which a UserWarning says once for each of these. As for that backend, a causal mask is
    top-left aligned.

    Raises:
        ImportError: diffusers is not installed.
        RuntimeError: this diffusers has no such enum and registry.
    """
    global _active_before
    names, registry, in_parallel = _dispatch()
    if NAME in names.__members__.values():
        return
    _active_before = registry._active_backend
    native = registry._backends[names.NATIVE]
    for name, attention, in_ring in ((NAME, exact, True), (NAME_FP8, in_8_bits, False)):
        backend = Backend(attention, in_ring, native, in_parallel)
        member = _add_member(names, name)
        function = functools.partial(attend, backend=backend)
        registry.register(member, constraints=[], supports_context_parallel=True)(function)
        registry._supported_arg_names[member].remove("backend")


def unregister() -> None:
    """Undoes `register`. Models that were set to one of the backends need another: their
    `reset_attention_backend`."""
    global _active_before
    names, registry, _ = _dispatch()
    for name in (NAME, NAME_FP8):
        if name not in names.__members__.values():
            continue
        member = names(name)
        if registry._active_backend is member:
            registry._active_backend = _active_before
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member)
        registry._supports_context_parallel.discard(name)
        remove_member(names, member)
    _active_before = None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
    *,
    backend: Backend,
) -> Tensor | tuple[Tensor, Tensor]:
    """A backend as diffusers calls it.

    Args:
        query, key, value: (batch, seqlen, heads, head_dim); fewer heads of key and value are taken
            with and without `enable_gqa`.

    Returns:
        The output, like query, and with `return_lse` the LSE, (batch, seqlen, heads), float32.
    """
    result: Tensor | tuple[Tensor, Tensor]
    visible = None if attn_mask is None else visible_keys(attn_mask, query, key)
    parallel = _parallel_config is not None
    if dropout_p or (attn_mask is not None and (visible is None or is_causal or parallel)):
        _warn_of_native("dropout" if dropout_p else "this mask")
        options = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, _parallel_config)
        result = backend.native(query, key, value, *options)
        return result
    if parallel:
        if not backend.in_ring and _parallel_config.context_parallel_config.ring_degree > 1:
            raise NotImplementedError(
                f"{NAME_FP8} has no ring attention: use ulysses_degree, or {NAME}"
            )
        result = backend.in_parallel(
            *(query, key, value, None, 0.0, is_causal, scale, enable_gqa, return_lse),
            forward_op=functools.partial(forward_op, attention=backend.attention),
            backward_op=backward_op,
            _parallel_config=_parallel_config,
        )
        return result
    lse: Any
    if visible is None:
        out, lse = backend.attention(query, key, value, is_causal, scale, return_lse)
    else:
        out, lse = among_visible(query, key, value, visible, scale)
    return (out, lse.transpose(1, 2)) if return_lse else out


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    if is_causal:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse = flash_attn_forward(query, key, value, scale, True, diagonal=0)
    else:
        out, lse = flash_attn_func(query, key, value, scale, return_lse=True)
    return out, lse


def in_8_bits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    if is_causal and query.shape[1] != key.shape[1]:
        return exact(query, key, value, is_causal, scale)
    # With it another kernel runs, which takes longer.
    result = flash_attn_fp8_func(query, key, value, scale, is_causal, return_lse=with_lse)
    out, lse = result if isinstance(result, tuple) else (result, None)
    return out, lse


def visible_keys(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """Which keys the queries of a batch entry see, (batch, seqlen_k), or None if that is not all
    that the mask says. As for diffusers' own backend "native" a mask of 2 dimensions is
    (batch, seqlen_k) where it can be, and others broadcast to (batch, heads, seqlen_q, seqlen_k).
    """
    batch, keys = key.shape[:2]
    if attn_mask.dtype != torch.bool or attn_mask.dim() > 4 or attn_mask.shape[-1:] != (keys,):
        return None
    if attn_mask.dim() == 2 and attn_mask.shape[0] == batch:
        return attn_mask
    attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    alike = all(attn_mask.shape[i] == 1 or attn_mask.stride(i) == 0 for i in (1, 2))
    if not alike or attn_mask.shape[0] not in (1, batch):
        return None
    return attn_mask[:, 0, 0].expand(batch, keys)


def among_visible(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention to the visible keys, which are moved to the front: without a causal mask the order
    of keys is nothing. How many they are only the GPU knows."""
    batch, seqlen_q = query.shape[:2]
    seqlen_k = key.shape[1]
    entries = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    order = (~visible).to(torch.uint8).argsort(dim=1, stable=True)
    rows = (order + entries[:-1, None] * seqlen_k).flatten()
    key, value = (x.flatten(0, 1).index_select(0, rows) for x in (key, value))
    out, lse = flash_attn_varlen_func(
        query.flatten(0, 1),
        key,
        value,
        entries * seqlen_q,
        entries * seqlen_k,
        seqlen_q,
        seqlen_k,
        seqused_k=visible.sum(dim=1, dtype=torch.int32),
        softmax_scale=scale,
        return_lse=True,
    )
    return out.unflatten(0, (batch, seqlen_q)), lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1)


def forward_op(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
    *,
    attention: Attention,
) -> Tensor | tuple[Tensor, Tensor]:
    """One rank's attention, as diffusers' templates call it inside of an autograd function."""
    lse: Any
    out, lse = attention(query, key, value, is_causal, scale, return_lse)
    lse = None if lse is None else lse.transpose(1, 2)
    if _save_ctx:
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        ctx.exact = attention is exact
    return (out, lse) if return_lse else out


def backward_op(ctx: Any, grad_out: Tensor, *_: Any, **of_step: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value.

    Args:
        of_step: query, key, value, out and lse in place of the saved ones: a step of ring attention
            has the keys of another rank, and out and lse of all of them.
    """
    if not ctx.exact:
        raise NotImplementedError(f"{NAME_FP8} has no gradient")
    names = ("query", "key", "value", "out", "lse")
    saved = dict(zip(names, ctx.saved_tensors, strict=True))
    query, key, value, out, lse = {**saved, **of_step}.values()
    lse = lse.transpose(1, 2).contiguous()
    deterministic = torch.are_deterministic_algorithms_enabled()
    tensors = (grad_out.contiguous(), None, query, key, value, out, lse)
    grads: tuple[Tensor, ...] = flash_attn_backward(*tensors, ctx.scale, False, deterministic)
    return grads[:3]


def _warn_of_native(what: str) -> None:
    if not torch.compiler.is_compiling():
        _warn_once(what)


@functools.cache
def _warn_once(what: str) -> None:
    warnings.warn(
        f"{NAME} does not take {what} from diffusers: such calls run on its backend native. "
        "Masks that it takes are boolean and hide the same keys from all queries.",
        stacklevel=4,
    )


def _dispatch() -> tuple[Any, Any, Any]:
    """diffusers' enum and registry of backends, and its context parallelism."""
    module: Any = importlib.import_module("diffusers.models.attention_dispatch")
    try:
        return (
            module.AttentionBackendName,
            module._AttentionBackendRegistry,
            module._templated_context_parallel_attention,
        )
    except AttributeError as error:
        raise RuntimeError(f"diffusers has no registry of attention backends: {error}") from None


def _add_member(names: Any, value: str) -> Any:
    """A further member of an enum of strings, as its class statement would have made it."""
    member = str.__new__(names, value)
    name = value.upper()
    member._name_, member._value_ = name, value
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    names._member_names_.append(name)
    names._member_map_[name] = names._value2member_map_[value] = member
    type.__setattr__(names, name, member)
    return member
