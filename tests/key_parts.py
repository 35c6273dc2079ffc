"""Calls and results of parts of attention, as the tests of cute_kernels.parts share them."""

import math

import torch
from parity import random_qkv

from cute_kernels.parts import Mask, Packed, attend_part

INF = math.inf


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(x, value=math.nan):
    """The same in memory that has other values between its rows and heads."""
    around = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 8), value)
    around[..., :-1, :-8] = x
    return around[..., :-1, :-8]


def random_results(device, shape, dtypes, seed=0):
    """Two outputs of N(0, 1) and LSEs far apart. Rows of both without keys hold NaN, and so does
    one that has none in either."""
    generator = torch.Generator(device).manual_seed(seed)
    how = {"generator": generator, "device": device, "dtype": wide_of(dtypes[0])}
    *batch, seqlen, heads, _ = shape
    results = []
    for dtype in dtypes:
        out, lse = torch.randn(shape, **how), 20 * torch.randn(*batch, heads, seqlen, **how)
        empty = torch.rand(lse.shape, generator=generator, device=device) < 0.3
        empty[..., 1, 2] = True
        lse.masked_fill_(empty, -INF)
        results += [out.masked_fill(empty.mT[..., None], math.nan).to(dtype), lse]
    return results


def lengths_of(call, diagonal=None):
    own = call.lengths()
    if diagonal is not None:
        diagonal = call._int32(diagonal)
    return Packed(*own.values(), diagonal)


def dense_call(dtype=torch.float32):
    q, k, v = random_qkv("cpu", dtype, 1, 9, 12, 4, 2, 16)
    out, lse = attend_part(q, k, v, 0.3, Mask(right=0))
    grads = [torch.ones(x.shape, dtype=wide_of(dtype)) for x in (q, k, v)]
    return grads, (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)
