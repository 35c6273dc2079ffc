"""Gradients of packed sequences and windows on a GPU: what only kernels can do wrong."""

import dataclasses
import math
import random

import pytest
import torch
from packed import assert_packed_right, random_grads, random_packed, starts
from parity import DTYPES, assert_gradients_right, random_qkv, skip_unless_answered

from cute_kernels import tile_configs
from cute_kernels.operators import (
    flash_attn_backward,
    flash_attn_forward,
    flash_attn_varlen_backward,
    flash_attn_varlen_forward,
)

HEAD_DIMS = [(n, n) for n in (64, 96, 128, 192, 256)] + [(192, 128)]  # of q and k, and of v
WINDOWS = [(None, None), (None, 0), (127, 0), (300, 60), (0, 0)]
ROWS = [
    pytest.param(row, id=row["name"])
    for row in tile_configs("backward")
    if row["any_call"] and not row["softcap"]
]
ORDERS = pytest.mark.parametrize("deterministic", [False, True])


def limits(window):
    """Keyword arguments of the operators and those of the reference."""
    left, right = window
    size = tuple(-1 if n is None else n for n in window)
    return {"window_left": left, "window_right": right}, {"window_size": size}


def packed_on(device, dtype, slots_q, slots_k=None, head_dims=(64, 64), heads=(4, 2), **options):
    skip_unless_answered(device, dtype, *head_dims)
    slots_k = slots_q if slots_k is None else slots_k
    chance = random.Random(len(slots_q))
    return random_packed(chance, device, dtype, slots_q, slots_k, head_dims, heads, **options)


def results_of(packed, grads, causal=False, tile_config=None, deterministic=False, **keywords):
    """Output, LSE and gradients, of the operators."""
    lengths = [packed.lengths()[f"{name}_{x}"] for name in ("cu_seqlens", "seqused") for x in "qk"]
    inputs = (*lengths, None, packed.q.shape[-1] ** -0.5, causal)
    out, lse = flash_attn_varlen_forward(*packed.qkv, *inputs, **keywords)
    keywords |= {"tile_config": tile_config, "deterministic": deterministic}
    gradients = flash_attn_varlen_backward(*grads, *packed.qkv, out, lse, *inputs, **keywords)
    return out, lse, *gradients


@ORDERS
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_table(hopper, row, window, deterministic):
    """Packed and dense, lengths around the row's tiles, NaN in rows that no sequence uses."""
    head_dim, head_dim_v, m, n = (row[x] for x in ("head_dim", "head_dim_v", "tile_m", "tile_n"))
    slots_q = [1, m - 1, m, m + 1, 0, 63, 2 * m + 65, 64, 5]
    slots_k = [n, n + 1, 1, 5 * n - 1, 7, 0, 900, 64, 300]
    dtype = DTYPES[row["dtype"]]
    packed = packed_on(hopper, dtype, slots_q, slots_k, (head_dim, head_dim_v), used=True, tail=300)
    grad_out, grad_lse = random_grads(packed)
    of_q, _ = packed.unused()
    spoilt = grad_out.masked_fill(of_q[:, None, None], math.nan), grad_lse
    keywords, mask = limits(window)
    options = {"tile_config": row["name"], "deterministic": deterministic}
    results = results_of(packed.spoilt(math.nan), spoilt, **keywords, **options)
    assert_packed_right(results, packed, (grad_out, grad_lse), **mask)

    for seqlen_q, seqlen_k in [(m + 1, 5 * n - 1), (700, 300), (300, 900)]:
        sizes = (2, seqlen_q, seqlen_k, 4, 2)
        q, k, v = random_qkv(hopper, dtype, *sizes, head_dim, head_dim_v=head_dim_v)
        grad_out = random_qkv(hopper, dtype, *sizes, head_dim_v, seed=1)[0]
        for diagonal in (None, 0, -150):
            out, lse = flash_attn_forward(q, k, v, 0.1, False, diagonal=diagonal, **keywords)
            inputs = (grad_out, None, q, k, v, out, lse, 0.1, False, deterministic, row["name"])
            grads = flash_attn_backward(*inputs, diagonal=diagonal, **keywords)
            options = {**mask, "diagonal": diagonal}
            assert_gradients_right(grads, grad_out, None, q, k, v, 0.1, False, **options)


@ORDERS
def test_many_short_sequences(hopper, deterministic):
    chance = random.Random(1)
    slots = [chance.randint(0, 40) for _ in range(1000)]
    packed = packed_on(hopper, torch.bfloat16, slots, heads=(2, 1))
    grads = random_grads(packed)
    results = results_of(packed, grads, causal=True, deterministic=deterministic)
    assert_packed_right(results, packed, grads, causal=True)


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("window", [(None, 0), (127, 0), (1500, 0), (90, 700)], ids=str)
def test_an_order_is_the_same_bits_each_time(hopper, head_dims, window):
    """And ends: first key blocks that see no query, few and many at a time."""
    packed = packed_on(hopper, torch.bfloat16, [5, 1700, 9000, 1, 0, 130], None, head_dims, (8, 1))
    grads = random_grads(packed)
    keywords, mask = limits(window)
    first = results_of(packed, grads, deterministic=True, **keywords)
    assert_packed_right(first, packed, grads, **mask)
    for _ in range(20):
        again = results_of(packed, grads, deterministic=True, **keywords)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("wild", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_what_a_window_hides_has_no_part(hopper, head_dims, wild):
    """Keys that no query sees, and the first query's gradient for keys that it does not see, give
    the same bits as 0 in their place."""
    slots_q, slots_k, left = [300, 150], [900, 700], 127
    packed = packed_on(hopper, torch.bfloat16, slots_q, slots_k, head_dims)
    grad_out, grad_lse = random_grads(packed)
    first_seen = [k - q - left for q, k in zip(slots_q, slots_k, strict=True)]
    results = []
    for value in (0.0, wild):
        k, v, wild_grad = packed.k.clone(), packed.v.clone(), grad_out.clone()
        for first, count in zip(starts(slots_k), first_seen, strict=False):
            k[first : first + count], v[first : first + count] = value, value
        wild_grad[0] = value
        call = dataclasses.replace(packed, k=k, v=v)
        options = {"window_left": left, "window_right": 0, "deterministic": True}
        results.append(results_of(call, (wild_grad, grad_lse), **options))
    of_query, of_keys = slice(0, 1), slice(first_seen[0], first_seen[0] + left + 1)
    seen = (None, None, of_query, of_keys, of_keys)
    for clean, spoilt, rows in zip(*results, seen, strict=False):  # the last one is of sinks
        if rows is not None:
            clean[rows], spoilt[rows] = 0.0, 0.0
        assert clean.isfinite().all()
        assert torch.equal(clean, spoilt)


@ORDERS
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (192, 128), (256, 256)], ids=str)
def test_wrong_contents_end_and_do_no_harm(hopper, head_dims, deterministic):
    """They are not looked at: results are any, but of this call alone."""
    slots = [700, 0, 400, 200]
    packed = packed_on(hopper, torch.bfloat16, slots, None, head_dims)
    grads = random_grads(packed)
    right = results_of(packed, grads, causal=True, deterministic=True)
    for wrong in ([0, 700, 100, 1300, 1000], [900, 3, -(2**31), 2**31 - 1, 5], [5, 5, 5, 5, 9999]):
        lengths = torch.tensor(wrong, dtype=torch.int32, device=hopper)
        for starts_k in (lengths, lengths.flip(0)):
            inputs = (lengths, starts_k, None, None, None, 0.1, True)
            tensors = (*grads, *packed.qkv, *right[:2])
            flash_attn_varlen_backward(*tensors, *inputs, deterministic=deterministic)
    again = results_of(packed, grads, causal=True, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(right, again, strict=True))


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_what_the_kernel_before_writes(hopper, head_dims):
    """Kernels start early, and read their inputs only when these are there: each call's are written
    just before it, over those that the last one has read."""
    slots = [1000, 0, 1, 399, 2000]
    calls = []
    for i in range(20):
        packed = packed_on(hopper, torch.bfloat16, slots, None, head_dims)
        q, k, v = (x.roll(i, 0) for x in packed.qkv)
        packed = dataclasses.replace(packed, q=q, k=k, v=v)
        grads = random_grads(packed, seed=i)
        results = results_of(packed, grads, causal=True, deterministic=True)
        calls.append(((*grads, q, k, v, *results[:2]), results[2:5]))
    cu = packed.lengths()["cu_seqlens_q"]
    inputs = (cu, cu, None, None, None, head_dims[0] ** -0.5, True)
    own = [torch.empty_like(x) for x in calls[0][0]]
    torch.cuda.synchronize()
    seen = []
    for tensors, _ in calls:
        for to, x in zip(own, tensors, strict=True):
            torch.add(x, 0, out=to)
        seen.append(flash_attn_varlen_backward(*own, *inputs, deterministic=True)[:3])
    for gradients, (_, right) in zip(seen, calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients, right, strict=True))


def test_lengths_that_change_under_a_graph(hopper):
    slots = [300, 20, 500, 180]
    packed = packed_on(hopper, torch.bfloat16, slots)
    lengths = torch.tensor(starts(slots), dtype=torch.int32, device=hopper)
    grads = random_grads(packed)

    def run():
        inputs = (lengths, lengths, None, None, None, packed.q.shape[-1] ** -0.5, True)
        out, lse = flash_attn_varlen_forward(*packed.qkv, *inputs)
        gradients = flash_attn_varlen_backward(*grads, *packed.qkv, out, lse, *inputs)
        return out, lse, *gradients

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for changed in (slots, [1, 0, 900, 99], [0, 0, 0, 1000], [64, 128, 1, 0]):
        lengths.copy_(torch.tensor(starts(changed), dtype=torch.int32))
        graph.replay()
        now = dataclasses.replace(packed, slots_q=changed, slots_k=changed)
        assert_packed_right([x.clone() for x in results], now, grads, causal=True)
