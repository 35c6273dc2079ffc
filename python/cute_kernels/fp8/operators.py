"""The registered FP8 operators: everything about them that is not compiled. The extension defines
them with their CUDA implementations; here are those for the CPU, and shape inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_kernels.fp8 import packed, reference
from cute_kernels.fp8.checks import check_forward, check_rows, check_values, check_whole
from cute_kernels.fp8.kernels import GPU_BUILT
from cute_kernels.fp8.quantize import quantize_by_operations
from cute_kernels.fp8.rotation import U64
from cute_kernels.fp8.tensor import (
    E4M3,
    KEY_PADDING,
    ROW_BLOCK,
    FP8Tensor,
    Quantisation,
    packed_value_keys,
)
from cute_kernels.fp8.varlen_checks import (
    check_varlen_forward,
    check_varlen_values,
    check_varlen_whole,
)
from cute_kernels.operators import packed_sequences
from cute_kernels.reference import mask_of
from cute_kernels.varlen_checks import rows_of_sequences


def _rows_cpu(
    x: Tensor, smooth: bool, incoherent: bool, seed: int, to_int8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.int8 if to_int8 else E4M3
    rows = quantize_by_operations(x, incoherent, seed & U64, ROW_BLOCK, dtype, smooth)
    shift = rows.shift
    if shift is None:
        shift = x.new_empty((x.shape[0], x.shape[2], 0), dtype=torch.float32)
    return rows.data, rows.scale, shift


def _rows_fake(
    x: Tensor, smooth: bool, incoherent: bool, seed: int, to_int8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seqlen, heads, head_dim = x.shape
    blocks = (seqlen + ROW_BLOCK - 1) // ROW_BLOCK
    shift = (batch, heads, head_dim if smooth else 0)
    return (
        x.new_empty(x.shape, dtype=torch.int8 if to_int8 else E4M3),
        x.new_empty((batch, heads, blocks), dtype=torch.float32),
        x.new_empty(shift, dtype=torch.float32),
    )


def _values_fake(v: Tensor) -> tuple[Tensor, Tensor]:
    batch, seqlen, heads, head_dim = v.shape
    padded = (seqlen + KEY_PADDING - 1) // KEY_PADDING * KEY_PADDING
    channels = 0 if v.dtype == E4M3 else head_dim
    return (
        v.new_empty((batch, heads, head_dim, padded), dtype=E4M3),
        v.new_empty((batch, heads, channels), dtype=torch.float32),
    )


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    causal: bool,
    out_float16: bool,
    tile_config: str | None = None,
    sinks: Tensor | None = None,
    score_offset: Tensor | None = None,
    with_lse: bool = False,
    sm_margin: int = 0,
    **window: Any,
) -> tuple[Tensor, Tensor]:
    def rows(x: Tensor, scale: Tensor) -> FP8Tensor:
        return FP8Tensor(x, scale, max(1, x.shape[1]) if scale.shape[2] == 1 else ROW_BLOCK)

    keys = k.shape[1]
    values = FP8Tensor(v, v_scale, max(1, keys), keys=keys)
    if v_scale.shape[2] > 1:
        values = FP8Tensor(v, v_scale.unsqueeze(2), None, keys=keys)
    quantised = rows(q, q_scale), rows(k, k_scale), values
    mask = mask_of(causal, **window)
    out, lse = reference.attention(*quantised, softmax_scale, mask, sinks, score_offset)
    return out.to(_out_dtype(out_float16)), lse


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    causal: bool,
    out_float16: bool,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    return _outputs_fake(q, v.shape[-2], out_float16)


def _whole_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    smooth_k: bool,
    incoherent: bool,
    seed: int,
    to_int8: bool,
    out_float16: bool,
    with_lse: bool = False,
    sinks: Tensor | None = None,
    **window: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q_rows, q_scale, _ = _rows_cpu(q, False, incoherent, seed, to_int8)
    k_rows, k_scale, shift = _rows_cpu(k, smooth_k, incoherent, seed, to_int8)
    values, v_scale = packed.values_of(v)
    inputs = q_rows, k_rows, values, q_scale, k_scale, v_scale
    offset = None
    if smooth_k and (with_lse or sinks is not None):
        offset = reference.score_offset(q, shift, softmax_scale)
    of_call = softmax_scale, causal, out_float16, None, sinks, offset
    return *_forward_cpu(*inputs, *of_call, **window), shift


def _whole_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    smooth_k: bool,
    incoherent: bool,
    seed: int,
    to_int8: bool,
    out_float16: bool,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shift = (k.shape[0], k.shape[2], k.shape[3] if smooth_k else 0)
    outputs = _outputs_fake(q, v.shape[-1], out_float16)
    return *outputs, k.new_empty(shift, dtype=torch.float32)


def _varlen_values_cpu(
    v: Tensor, cu_seqlens: Tensor, seqused: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = rows_of_sequences("v", v, cu_seqlens, seqused, None)
    return packed.values_of_sequences(v, rows)


def _varlen_values_fake(
    v: Tensor, cu_seqlens: Tensor, seqused: Tensor | None
) -> tuple[Tensor, Tensor]:
    total, heads, head_dim = v.shape
    batch = cu_seqlens.shape[0] - 1
    keys = packed_value_keys(total, batch)
    channels = 0 if v.dtype == E4M3 else head_dim
    return (
        v.new_empty((heads, head_dim, keys), dtype=E4M3),
        v.new_empty((batch, heads, channels), dtype=torch.float32),
    )


def _varlen_forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    diagonal: Tensor | None,
    softmax_scale: float,
    causal: bool,
    out_float16: bool,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal)
    sequences, mask = packed_sequences(q, k, lengths, causal, **options)
    scales, dtype = (q_scale, k_scale, v_scale), _out_dtype(out_float16)
    return packed.attention_of_quantised(
        q, k, v, scales, sequences, softmax_scale, mask, sinks, dtype
    )


def _varlen_cpu(
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
    smooth_k: bool,
    incoherent: bool,
    seed: int,
    to_int8: bool,
    out_float16: bool,
    with_lse: bool = False,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal)
    sequences, mask = packed_sequences(q, k, lengths, causal, **options)
    dtype = torch.int8 if to_int8 else E4M3
    how = Quantisation(incoherent, seed & U64, smooth_k, dtype)
    return packed.attention_of_sequences(
        q, k, v, sequences, softmax_scale, mask, how, sinks, _out_dtype(out_float16), with_lse
    )


def _varlen_forward_fake(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    return _outputs_fake(q, v.shape[-2], options[10])


def _varlen_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any, **_: Any) -> tuple[Tensor, Tensor]:
    return _outputs_fake(q, v.shape[-1], options[11])


def _outputs_fake(q: Tensor, head_dim_v: int, out_float16: bool) -> tuple[Tensor, Tensor]:
    *batch, seqlen, heads, _ = q.shape
    out = q.new_empty((*batch, seqlen, heads, head_dim_v), dtype=_out_dtype(out_float16))
    return out, q.new_empty((*batch, heads, seqlen), dtype=torch.float32)


def _out_dtype(out_float16: bool) -> torch.dtype:
    return torch.float16 if out_float16 else torch.bfloat16


def _register(
    name: str, check: Callable[..., None], cpu: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    def checked_cpu(*inputs: Any, **keywords: Any) -> Any:
        check(*inputs, **keywords)
        with torch.autocast("cpu", enabled=False):
            results = cpu(*inputs, **keywords)
        # Empty results have the strides of new ones, too.
        return tuple(x if x.numel() else x.new_empty(x.shape) for x in results)

    def checked_fake(*inputs: Any, **keywords: Any) -> Any:
        check(*inputs, **keywords)
        return fake(*inputs)

    torch.library.impl(f"cute_kernels::{name}", "cpu", checked_cpu)
    torch.library.register_fake(f"cute_kernels::{name}", checked_fake)


if GPU_BUILT:
    _register("quantize_fp8_rows", check_rows, _rows_cpu, _rows_fake)
    _register("quantize_fp8_values", check_values, packed.values_of, _values_fake)
    _register("flash_attn_fp8_forward", check_forward, _forward_cpu, _forward_fake)
    _register("flash_attn_fp8", check_whole, _whole_cpu, _whole_fake)
    _register(
        "quantize_fp8_varlen_values", check_varlen_values, _varlen_values_cpu, _varlen_values_fake
    )
    _register(
        "flash_attn_fp8_varlen_forward",
        check_varlen_forward,
        _varlen_forward_cpu,
        _varlen_forward_fake,
    )
    _register("flash_attn_fp8_varlen", check_varlen_whole, _varlen_cpu, _varlen_fake)
