"""The FP8 kernel's arithmetic on the CPU, so that errors are studied without a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cute_kernels.fp8.tensor import FP8Tensor
from cute_kernels.reference import _Blocks, hide, mask_of
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


def attention(
    q: FP8Tensor, k: FP8Tensor, v: FP8Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The kernel's arithmetic, in units of powers of two: exact products of 8-bit numbers, scaled;
    a lazily moving origin; P in e4m3; V's scale at the end."""
    batch, seqlen, heads, head_dim = q.data.shape
    linear = uses_linear_exp(q.data.dtype, head_dim)
    shift, slack = (LINEAR_P_SHIFT, LINEAR_P_SLACK) if linear else (P_SHIFT, P_SLACK)
    out = q.data.new_zeros(q.data.shape, dtype=torch.float32)
    lse = q.data.new_full((batch, heads, seqlen), -math.inf, dtype=torch.float32)
    if out.numel() == 0 or k.data.numel() == 0:
        return out, lse
    to_log2 = min(softmax_scale, LARGEST_SCALE) * math.log2(math.e)
    blocks = _Blocks(q.data, k.data, 1.0, mask_of(causal))
    all_k, all_v = blocks.all_keys(k.data), blocks.all_keys(v.rows())
    q_scales = (q.row_scales() * to_log2).clamp_max(LARGEST_QUERY_FACTOR)  # NaN stays
    k_scales = k.row_scales().permute(0, 2, 3, 1)  # (batch, key heads, 1, seqlen_k)
    for queries in blocks.queries():
        q_rows, q_scale = blocks.rows(q.data, queries), blocks.rows(q_scales, queries)
        accumulator = torch.zeros_like(q_rows)
        origin = q_rows.new_full((*q_rows.shape[:3], 1), -math.inf)
        total = torch.zeros_like(origin)
        for keys, hidden in blocks.keys(queries):
            # Factors as good as 0 are not 0; -inf after the factor, which may be NaN.
            factor = (q_scale * k_scales[..., keys]).clamp_min(SMALLEST_FACTOR)
            scores = hide((q_rows @ all_k[:, :, keys].mT) * factor, hidden)
            maximum = scores.amax(-1, keepdim=True)
            new_origin = torch.where(maximum <= origin + slack, origin, maximum)  # NaN moves it
            finite = new_origin.masked_fill(new_origin == -math.inf, 0.0)
            rescale = torch.exp2(origin - finite)
            origin = new_origin
            p, rounded = _probabilities(scores - (finite - shift), linear)
            total = total * rescale + p.sum(-1, keepdim=True)
            accumulator = accumulator * rescale + rounded @ all_v[:, :, keys]
        accumulator /= total.masked_fill(total == 0, 1.0)
        out[:, queries] = blocks.from_rows(accumulator)
        log2_sum = (origin - shift + total.log2()).masked_fill(total == 0, -math.inf)
        lse[:, :, queries] = (log2_sum * math.log(2)).view(batch, heads, -1)
    v_scale = v.row_scales().repeat_interleave(blocks.group, dim=2)
    if v.block is not None:
        v_scale = v_scale[:, :1]
    return out * v_scale, lse


def uses_linear_exp(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel that is chosen for Q and K of this dtype does without exponentials: the
    last one of the smallest head dim that fits."""
    name = "int8" if dtype == torch.int8 else "e4m3"
    rows = [
        row
        for row in reversed(tile_configs("forward_fp8"))
        if row["dtype"] == name and row["head_dim"] >= head_dim and row["mask"] != "none"
    ]
    return bool(rows) and bool(min(rows, key=lambda row: row["head_dim"])["linear_exp"])


def _probabilities(exponents: Tensor, linear: bool) -> tuple[Tensor, Tensor]:
    """P as the row sums count it, and as V is multiplied by it."""
    if linear:
        bits = ((exponents + LINEAR_BIAS) * 8).clamp(0, 126).round().nan_to_num()
        p = bits.to(torch.uint8).view(torch.float8_e4m3fn).float()
        p = torch.where(exponents.isnan(), exponents, p)
        return p, p
    p = torch.exp2(exponents)
    return p, p.to(torch.float8_e4m3fn).float()
