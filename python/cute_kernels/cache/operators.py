"""The registered operators of this folder: everything about them that is not compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_kernels.cache import reference
from cute_kernels.cache.checks import check_append, check_attention, check_attention_out
from cute_kernels.cache.combine_checks import check_combine
from cute_kernels.cache.eight_bits import output_dtype
from cute_kernels.operators import NAMESPACE, Pass
from cute_kernels.reference import empty_outputs
from cute_kernels.registration import register

_operators = getattr(torch.ops, NAMESPACE)


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


_OPTIONS = (
    "max_seqlen_q",
    "window_left",
    "window_right",
    "softcap",
    "num_splits",
    "sm_margin",
    "rotation_seed",
    "attention_chunk",
)
attention = register(
    Pass(_operators.flash_attn_kvcache_forward.default, check_attention, 16),
    _OPTIONS,
    reference.attention,
    _attention_fake,
)
attention_out = register(
    Pass(_operators.flash_attn_kvcache_forward_out.default, check_attention_out, 17),
    _OPTIONS,
    reference.attention_out,
    _attention_out_fake,
    has_autograd=False,
)
append = register(
    Pass(_operators.append_kv.default, check_append, 20),
    (),
    reference.append,
    _append_fake,
    has_autograd=False,
)
combine = register(
    Pass(_operators.flash_attn_combine.default, check_combine, 2),
    ("out_dtype",),
    reference.combine,
    _combine_fake,
)
