"""The FP8 kernel's arithmetic on the CPU, so that errors are studied without a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cute_kernels.fp8.quantize import SATURATION
from cute_kernels.fp8.rotation import rotate
from cute_kernels.fp8.tensor import FP8Tensor
from cute_kernels.reference import Mask, _Blocks, hide
from cute_kernels.tiles import tile_configs

# P is rounded to e4m3 as 2^(score - origin + shift), where the origin follows the row's maximum
# once it is passed by more than slack: at most 2^(shift + slack), below e4m3's 448.
P_SHIFT, P_SLACK = 6.0, 2.0
# Kernels with linear_exp take P to be linear between powers of two (ScaledSoftmax in
# fp8_softmax.hpp). Small P are wrong then: hence another range.
LINEAR_P_SHIFT, LINEAR_P_SLACK = 7.0, 1.5
LINEAR_BIAS = 7 - 0.0563
LARGEST_SCALE = 2.0**64  # of scores: beyond it, the largest one has all the weight, too
SMALLEST_FACTOR = 2.0**-100  # of scores to powers of two
LARGEST_QUERY_FACTOR = 2.0**56

_CHUNK = 1 << 23  # elements of q that are in float32 at a time


def attention(
    q: FP8Tensor,
    k: FP8Tensor,
    v: FP8Tensor,
    softmax_scale: float,
    mask: Mask,
    sinks: Tensor | None = None,
    score_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel's arithmetic, in units of powers of two: exact products of 8-bit numbers, scaled;
    a lazily moving origin; P in e4m3; V's scale at the end. All scores of a row are higher by
    score_offset, (batch, heads, seqlen), which its sink and its LSE see."""
    batch, seqlen, heads, head_dim = q.data.shape
    linear = uses_linear_exp(q.data.dtype, head_dim, v.shape[3])
    shift, slack = (LINEAR_P_SHIFT, LINEAR_P_SLACK) if linear else (P_SHIFT, P_SLACK)
    out = q.data.new_zeros((batch, seqlen, heads, v.shape[3]), dtype=torch.float32)
    lse = q.data.new_full((batch, heads, seqlen), -math.inf, dtype=torch.float32)
    if out.numel() == 0 or k.data.numel() == 0:
        return out, lse if sinks is None else lse.copy_(sinks[:, None])
    to_log2 = min(softmax_scale, LARGEST_SCALE) * math.log2(math.e)
    blocks = _Blocks(q.data, k.data, 1.0, mask)
    all_k, all_v = blocks.all_keys(k.data), blocks.all_keys(v.rows())
    q_scales = (q.row_scales() * to_log2).clamp_max(LARGEST_QUERY_FACTOR)  # NaN stays
    k_scales = k.row_scales().permute(0, 2, 3, 1)  # (batch, key heads, 1, seqlen_k)
    for queries in blocks.queries():
        q_rows, q_scale = blocks.rows(q.data, queries), blocks.rows(q_scales, queries)
        accumulator = q_rows.new_zeros((*q_rows.shape[:3], v.shape[3]))
        origin = q_rows.new_full((*q_rows.shape[:3], 1), -math.inf)
        total = exact_total = torch.zeros_like(origin)  # of P as O counts it, and the LSE's
        for keys, hidden in blocks.keys(queries):
            # Factors as good as 0 are not 0; -inf after the factor, which may be NaN.
            factor = (q_scale * k_scales[..., keys]).clamp_min(SMALLEST_FACTOR)
            scores = hide((q_rows @ all_k[:, :, keys].mT) * factor, hidden)
            maximum = scores.amax(-1, keepdim=True)
            new_origin = torch.where(maximum <= origin + slack, origin, maximum)  # NaN moves it
            finite = new_origin.masked_fill(new_origin == -math.inf, 0.0)
            rescale = torch.exp2(origin - finite)
            origin = new_origin
            exact, p, rounded = _probabilities(scores - (finite - shift), linear)
            exact_total = exact_total * rescale + exact.sum(-1, keepdim=True)
            total = total * rescale + p.sum(-1, keepdim=True)
            accumulator = accumulator * rescale + rounded @ all_v[:, :, keys]
        accumulator /= total.masked_fill(total == 0, 1.0)
        base = (origin - shift) * math.log(2)
        if score_offset is not None:
            base = base + blocks.row_values(score_offset, queries)
        row_lse = _lse_of(exact_total, base)
        if sinks is not None:
            of_head, of_keys = blocks.head_values(sinks, queries), _lse_of(total, base)
            row_lse = torch.logaddexp(row_lse, of_head)
            # -inf - -inf would be NaN: a row that has seen no key is 0 already.
            with_sink = torch.logaddexp(of_keys, of_head).masked_fill(of_keys == -math.inf, 0.0)
            accumulator *= (of_keys - with_sink).exp_()
        out[:, queries] = blocks.from_rows(accumulator)
        lse[:, :, queries] = row_lse.view(batch, heads, -1)
    v_scale = v.row_scales().repeat_interleave(blocks.group, dim=2)
    if v.block is not None:
        v_scale = v_scale[:, :1]
    return out * v_scale, lse


def score_offset(q: Tensor | FP8Tensor, shift: Tensor, softmax_scale: float) -> Tensor:
    """What the row that was subtracted from k adds to a query's scores, and so to its LSE: (batch,
    heads, seqlen)."""
    rows = q.data if isinstance(q, FP8Tensor) else q
    scale = None
    if isinstance(q, FP8Tensor):
        scale = q.row_scales().squeeze(-1)
        if q.seed is not None:  # as M is orthogonal
            shift = rotate(shift, q.seed)
    batch, seqlen, heads, head_dim = rows.shape
    shift = shift.repeat_interleave(heads // max(1, shift.shape[1]), dim=1).unsqueeze(1)
    # In float32 a few rows at a time. Compilers fuse the product with the sum.
    count = max(1, seqlen)
    if not torch.compiler.is_compiling():
        count = max(1, _CHUNK // max(1, batch * heads * head_dim))
    sums = [
        (chunk.float().clamp(-SATURATION, SATURATION) * shift).sum(-1)
        for chunk in torch.split(rows, count, dim=1)
    ]
    products = torch.cat(sums, dim=1)
    if scale is not None:
        products = products * scale
    return (softmax_scale * products.transpose(1, 2)).contiguous()


def uses_linear_exp(dtype: torch.dtype, head_dim: int, head_dim_v: int | None = None) -> bool:
    """Whether the kernel that is chosen for Q and K of this dtype does without exponentials: the
    last one of the smallest head dims that fit."""
    name = "int8" if dtype == torch.int8 else "e4m3"
    chosen, smallest = None, 0
    for row in reversed(tile_configs("forward_fp8")):
        fits = row["head_dim"] >= head_dim and row["head_dim_v"] >= (head_dim_v or head_dim)
        size = row["head_dim"] + row["head_dim_v"]
        # Not by `min`, whose `key` the compiler of torch 2.10 cannot trace.
        if row["dtype"] != name or row["mask"] == "none" or not fits:
            continue
        if chosen is None or size < smallest:
            chosen, smallest = row, size
    return chosen is not None and bool(chosen["linear_exp"])


def _lse_of(total: Tensor, base: Tensor) -> Tensor:
    return (total.log() + base).masked_fill(total == 0, -math.inf)


def _probabilities(exponents: Tensor, linear: bool) -> tuple[Tensor, Tensor, Tensor]:
    """P, as the row sums count it, and as V is multiplied by it."""
    exact = torch.exp2(exponents)
    if linear:
        bits = ((exponents + LINEAR_BIAS) * 8).clamp(0, 126).round().nan_to_num()
        p = bits.to(torch.uint8).view(torch.float8_e4m3fn).float()
        p = torch.where(exponents.isnan(), exponents, p)
        return exact, p, p
    return exact, exact, exact.to(torch.float8_e4m3fn).float()
