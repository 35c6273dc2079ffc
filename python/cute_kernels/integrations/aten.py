"""PyTorch's flash attention operators, answered by this package's.

Each function takes what the ATen operator of its name takes, on any device, and returns what that
returns. Where this package cannot answer it returns NotImplemented, and has changed nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from cute_kernels.arguments import window_of
from cute_kernels.operators import DENSE, VARLEN, Pass, flash_attn_heads_first
from cute_kernels.tiles import ROWS
from cute_kernels.torch_private import direct

_heads_first = direct(flash_attn_heads_first)
_deterministic = torch.are_deterministic_algorithms_enabled
_DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}

# What `_make_unread` gave: all calls share it, as to make it anew takes a fifth of a small call's
# host time. Only `keep_unread` adds to it, so that none of it is memory of a CUDA graph.
_kept_unread: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}


def scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **later: Any,
) -> Any:
    """query, key and value are (batch, heads, seqlen, head_dim). A causal mask is bottom-right
    aligned: `F.scaled_dot_product_attention`, whose is top-left aligned, comes here only with
    lengths for which that is the same, and `CausalBias` relies on the difference."""
    if dropout_p or return_debug_mask or (later and _asks(later)) or query.dim() != 4:
        return NotImplemented
    softmax_scale = _softmax_scale(query, scale)
    if softmax_scale is None or not _has_kernel("forward", query, value, is_causal, False):
        return NotImplemented
    try:
        out, lse = _heads_first(query, key, value, softmax_scale, is_causal)
    except (RuntimeError, TypeError, ValueError):
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        if _is_refused(DENSE.forward, *tensors, softmax_scale, is_causal):
            return NotImplemented
        raise
    if out.stride() != query.stride():
        like, result = query.transpose(1, 2), out.transpose(1, 2)
        out = _laid_out_as(like, result).transpose(1, 2)
    return out, lse, None, None, query.shape[2], key.shape[2], *_unread(query)


def scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
    **later: Any,
) -> Any:
    if cum_seq_q is not None or cum_seq_k is not None or query.dim() != 4:
        return NotImplemented
    grads = flash_attention_backward(
        grad_out.transpose(1, 2),
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        out.transpose(1, 2),
        logsumexp,
        None,
        None,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        philox_seed,
        philox_offset,
        scale=scale,
        **later,
    )
    if grads is NotImplemented:
        return NotImplemented
    return tuple(x.transpose(1, 2) for x in grads)


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    num_splits: int | None = None,
    **later: Any,
) -> Any:
    """query is (batch, seqlen, heads, head_dim), or with cum_seq_q and cum_seq_k (total, heads,
    head_dim). `num_splits` is a hint: no split changes a bit of the result."""
    if dropout_p or return_debug_mask or _asks(later) or (cum_seq_q is None) != (cum_seq_k is None):
        return NotImplemented
    packed = None
    if cum_seq_q is not None:
        packed = (cum_seq_q, cum_seq_k, None, seqused_k, None), (max_q, max_k)
    elif seqused_k is not None:
        return NotImplemented
    window = (window_size_left, window_size_right)
    return _forward(query, key, value, packed, is_causal, window, scale)


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **later: Any,
) -> Any:
    """out and logsumexp may be those of more keys than key has (a step of ring attention), and of
    another implementation."""
    if dropout_p or _asks(later) or (cum_seq_q is None) != (cum_seq_k is None):
        return NotImplemented
    packed = cum_seq_q is not None
    causal, *limits = _mask(is_causal, window_size_left, window_size_right)
    any_call = packed or limits != [None, None]
    softmax_scale = _softmax_scale(query, scale)
    if softmax_scale is None or not _has_kernel("backward", query, value, causal, any_call):
        return NotImplemented
    grad_out, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, out))
    inputs: tuple[Any, ...] = (grad_out, None, query, key, value, out, logsumexp)
    options = {"window_left": limits[0], "window_right": limits[1]} if any_call else {}
    if packed:
        lengths = (cum_seq_q, cum_seq_k, None, None, None)
        options.update(max_seqlen_q=max_q, max_seqlen_k=max_k, deterministic=_deterministic())
        inputs = (*inputs, *lengths, softmax_scale, causal)
        grads = _unless_refused(VARLEN.backward, *inputs, **options)
    else:
        inputs = (*inputs, softmax_scale, causal, _deterministic())
        grads = _unless_refused(DENSE.backward, *inputs, **options)
    if grads is NotImplemented:
        return NotImplemented
    of_qkv = zip((query, key, value), grads[:3], strict=True)
    return tuple(_laid_out_as(x, grad) for x, grad in of_qkv)


def flash_attention_forward_no_dropout_inplace(
    out: Tensor, query: Tensor, *inputs: Any, **options: Any
) -> Any:
    """`flash_attention_forward` into out: the LSE."""
    answer = flash_attention_forward(query, *inputs, **options)
    if answer is NotImplemented:
        return NotImplemented
    out.copy_(answer[0])
    return answer[1]


Packed = tuple[tuple[Tensor | None, ...], tuple[int, int]]  # lengths, and max_q and max_k


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed | None,
    is_causal: bool,
    window: tuple[int | None, int | None],
    scale: float | None,
) -> Any:
    """What `flash_attention_forward` returns."""
    causal, *limits = _mask(is_causal, *window)
    any_call = packed is not None or limits != [None, None]
    softmax_scale = _softmax_scale(query, scale)
    if softmax_scale is None or not _has_kernel("forward", query, value, causal, any_call):
        return NotImplemented
    options = {"window_left": limits[0], "window_right": limits[1]} if any_call else {}
    if packed is not None:
        lengths, (options["max_seqlen_q"], options["max_seqlen_k"]) = packed
        inputs = (query, key, value, *lengths, softmax_scale, causal)
        answer = _unless_refused(VARLEN.forward, *inputs, **options)
    else:
        answer = _unless_refused(DENSE.forward, query, key, value, softmax_scale, causal, **options)
    if answer is NotImplemented:
        return NotImplemented
    out, lse = answer
    return _laid_out_as(query, out), lse, *_unread(query)


def _unread(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    place = query.device, query.dtype
    return _kept_unread.get(place) or _make_unread(*place)


def _make_unread(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What the operators return beside output and LSE: the two that dropout would draw from, and
    the debug mask. Without dropout nobody reads them, or writes to them."""
    rng_state = torch.empty(2, dtype=torch.uint64, device=device)
    unused = torch.empty((), dtype=torch.uint64, device=device)
    return rng_state, unused, torch.empty(0, dtype=dtype, device=device)


def keep_unread(device: torch.device) -> None:
    """Has calls on a device share what nobody reads of their results. Not while a CUDA graph is
    captured."""
    for dtype in _DTYPE_NAMES:
        _kept_unread[device, dtype] = _make_unread(device, dtype)


def drop_unread() -> None:
    _kept_unread.clear()


def _asks(later: dict[str, Any]) -> bool:
    """Whether an argument that is not known here asks for something: ALiBi, pages of keys, what
    another PyTorch has."""
    return any(value is not None for value in later.values())


def _mask(
    is_causal: bool, left: int | None, right: int | None
) -> tuple[bool, int | None, int | None]:
    """As the operators take it. What is negative is no limit, as in FlashAttention."""
    if left is None and right is None:
        return is_causal, None, None
    limits = [-1 if limit is None or limit < 0 else limit for limit in (left, right)]
    return window_of(limits, is_causal)


def _softmax_scale(query: Tensor, scale: float | None) -> float | None:
    """None if this package takes no such scale."""
    if scale is None:
        head_dim = query.shape[-1] if query.dim() else 0
        return head_dim**-0.5 if head_dim else None
    return scale if 0 < scale < math.inf else None


def _has_kernel(of_pass: str, query: Tensor, value: Tensor, causal: bool, any_call: bool) -> bool:
    """Whether this build has one for such a call, and the GPU is one that they run on. Of another
    head dim of value shape inference does not know: the output is query's size to it."""
    head_dim = query.shape[-1]
    if value.dim() != query.dim() or value.shape[-1] != head_dim:
        return False
    if not query.is_cuda:
        return True
    if not _is_hopper(query.get_device()):
        return False
    dtype, rows = _DTYPE_NAMES.get(query.dtype), len(ROWS[of_pass])
    return _has_row(of_pass, dtype, head_dim, causal, any_call, rows)


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.lru_cache(256)
def _has_row(
    of_pass: str, dtype: str | None, head_dim: int, causal: bool, any_call: bool, rows: int
) -> bool:
    """As may_take in attention/tile_config.hpp. `rows`: how many there are, as they can become
    more."""
    masks = ("any", "causal" if causal or any_call else "full")
    return any(
        row["dtype"] == dtype
        and row["mask"] in masks
        and min(row["head_dim"], row.get("head_dim_v", row["head_dim"])) >= head_dim
        and (not any_call or row.get("any_call", False))
        and not row.get("grouped")  # of short windows
        for row in ROWS[of_pass].values()
    )


def _unless_refused(of_pass: Pass, *inputs: Any, **options: Any) -> Any:
    """What an operator returns, or NotImplemented if it does not take the inputs. Any other error
    is one."""
    try:
        return direct(of_pass.operator)(*inputs, **options)
    except (RuntimeError, TypeError, ValueError):
        if _is_refused(of_pass, *inputs, **options):
            return NotImplemented
        raise


def _is_refused(of_pass: Pass, *inputs: Any, **options: Any) -> bool:
    try:
        of_pass.check(*inputs, **options)
    except (TypeError, ValueError, NotImplementedError):
        return True
    return False


def _laid_out_as(like: Tensor, result: Tensor) -> Tensor:
    """result with the strides of ``torch.empty_like(like)``, which PyTorch's shape inference has
    promised to compilers. Only a query with the heads outside of the sequence costs a copy."""
    if result.stride() == like.stride():
        return result
    strides = torch.empty_like(like, device="meta").stride()
    sizes = zip(result.shape, result.stride(), strides, strict=True)
    if all(size <= 1 or ours == promised for size, ours, promised in sizes):
        return result
    return torch.empty_like(like).copy_(result)
