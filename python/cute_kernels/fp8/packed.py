"""Packed sequences in FP8: where the quantised copies have what is a sequence's, and the CPU's
implementations, which answer the sequences one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cute_kernels.fp8.quantize import quantize_by_operations
from cute_kernels.fp8.reference import attention, score_offset
from cute_kernels.fp8.tensor import (
    E4M3,
    KEY_PADDING,
    ROW_BLOCK,
    VALUE_KEYS,
    FP8Tensor,
    Quantisation,
    first_block,
    in_key_order,
    packed_value_keys,
)
from cute_kernels.reference import Mask, Sequence

Attend = Callable[[int, Sequence], tuple[Tensor, Tensor]]


def value_columns(keys: slice, entry: int) -> slice:
    """Where a sequence's keys stand in the transposed v, padded as a dense v's are."""
    start = first_block(keys.start, entry, VALUE_KEYS) * VALUE_KEYS
    count = keys.stop - keys.start
    return slice(start, start + count + -count % KEY_PADDING)


def values_of(v: Tensor) -> tuple[Tensor, Tensor]:
    """The operator quantize_fp8_values: v as the kernel reads it, and the scales of its channels,
    none of an e4m3 v."""
    if v.dtype == E4M3:
        return in_key_order(v), v.new_empty((v.shape[0], v.shape[2], 0), dtype=torch.float32)
    values = quantize_by_operations(v, False, 0, None, E4M3, False)
    return in_key_order(values.data), values.scale.squeeze(2)


def values_of_sequences(v: Tensor, rows: list[slice]) -> tuple[Tensor, Tensor]:
    """The same of packed sequences: (heads, head_dim, keys of all), (batch, heads, head_dim)."""
    total, heads, head_dim = v.shape
    keys = packed_value_keys(total, len(rows))
    channels = 0 if v.dtype == E4M3 else head_dim
    data = v.new_zeros((heads, head_dim, keys), dtype=torch.uint8).view(E4M3)
    scale = v.new_zeros((len(rows), heads, channels), dtype=torch.float32)
    for entry, part in enumerate(rows):
        values, scale[entry : entry + 1] = values_of(v[None, part])
        data[..., value_columns(part, entry)] = values[0]
    return data, scale


def attend_each(
    q: Tensor, head_dim_v: int, dtype: torch.dtype, sequences: list[Sequence], attend: Attend
) -> tuple[Tensor, Tensor]:
    """Output and LSE, of attend(number, sequence) for each; rows of none get 0 and -inf."""
    total, heads, _ = q.shape
    out = q.new_zeros((total, heads, head_dim_v), dtype=dtype)
    lse = q.new_full((heads, total), -math.inf, dtype=torch.float32)
    for entry, sequence in enumerate(sequences):
        part, part_lse = attend(entry, sequence)
        out[sequence.queries], lse[:, sequence.queries] = part[0].to(dtype), part_lse[0]
    return out, lse


def attention_of_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: list[Sequence],
    softmax_scale: float,
    mask: Mask,
    how: Quantisation,
    sinks: Tensor | None,
    dtype: torch.dtype,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_fp8_varlen_func`, of checked arguments; dtype is the output's. Without
    `with_lse` the LSE is that of k less what was subtracted from it."""
    row_options = how.incoherent, how.seed, ROW_BLOCK, how.qk_dtype

    def attend(_: int, sequence: Sequence) -> tuple[Tensor, Tensor]:
        queries, keys, diagonal = sequence
        q8 = quantize_by_operations(q[None, queries], *row_options, False)
        k8 = quantize_by_operations(k[None, keys], *row_options, how.smooth_k)
        v8 = quantize_by_operations(v[None, keys], False, 0, None, E4M3, False)
        offset = None
        if k8.shift is not None and (with_lse or sinks is not None):
            offset = score_offset(q[None, queries], k8.shift, softmax_scale)
        own_mask = mask._replace(diagonal=diagonal)
        return attention(q8, k8, v8, softmax_scale, own_mask, sinks, offset)

    return attend_each(q, v.shape[-1], dtype, sequences, attend)


def attention_of_quantised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    sequences: list[Sequence],
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same of what the operator flash_attn_fp8_varlen_forward takes."""
    q_scale, k_scale, v_scale = scales
    batch = len(sequences)

    def rows(x: Tensor, scale: Tensor, part: slice, entry: int) -> FP8Tensor:
        count = part.stop - part.start
        if scale.shape[0] == batch and scale.shape[2] == 1:
            return FP8Tensor(x[None, part], scale[entry, None, :, : min(count, 1)], max(1, count))
        start = first_block(part.start, entry, ROW_BLOCK)
        blocks = scale[:, :, start : start + -(-count // ROW_BLOCK)]
        return FP8Tensor(x[None, part], blocks, ROW_BLOCK)

    def attend(entry: int, sequence: Sequence) -> tuple[Tensor, Tensor]:
        queries, keys, diagonal = sequence
        count = keys.stop - keys.start
        data = v[None, :, :, value_columns(keys, entry)]
        values = FP8Tensor(data, v_scale[entry, None], max(1, count), keys=count)
        if v_scale.shape[2] > 1:
            values = FP8Tensor(data, v_scale[entry, None, :, None], None, keys=count)
        q8, k8 = rows(q, q_scale, queries, entry), rows(k, k_scale, keys, entry)
        return attention(q8, k8, values, softmax_scale, mask._replace(diagonal=diagonal), sinks)

    return attend_each(q, v.shape[-2], dtype, sequences, attend)
