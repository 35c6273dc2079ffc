"""Sliding windows, explicit diagonals, and V with a head dim of its own: results of dense calls."""

import itertools
import math
import random

import pytest
import torch
from oracle import visible
from parity import (
    DTYPES,
    WINDOWS,
    assert_gradients_right,
    assert_right,
    by_token,
    check,
    one_hot,
    random_mask,
    random_qkv,
    run,
    skip_unless_answered,
)
from torch.utils._python_dispatch import TorchDispatchMode

from cute_kernels import flash_attn_func, reference
from cute_kernels.operators import flash_attn_backward, flash_attn_forward


def random_qkv_and_grads(chance, device, dtype, batch, seqlen_q, seqlen_k):
    """Head dims and heads by chance, and gradients of the output and of the LSE."""
    key_heads = chance.choice([1, 1, 2, 3])
    heads = key_heads * chance.choice([1, 2, 4])
    head_dim, head_dim_v = (8 * chance.randint(1, 16) for _ in range(2))
    if chance.random() < 0.2:
        head_dim, head_dim_v = chance.choice([(192, 128), (64, 256), (256, 64), (256, 256)])
    generator = torch.Generator(device).manual_seed(chance.randrange(2**31))

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    q = normal(batch, seqlen_q, heads, head_dim).to(dtype)
    k = normal(batch, seqlen_k, key_heads, head_dim).to(dtype)
    v = normal(batch, seqlen_k, key_heads, head_dim_v).to(dtype)
    grad_out = normal(batch, seqlen_q, heads, head_dim_v).to(dtype)
    grad_lse = normal(batch, heads, seqlen_q) if chance.random() < 0.5 else None
    return (q, k, v), grad_out, grad_lse


@pytest.mark.parametrize("seed", range(80))
def test_random_calls(device, seed):
    chance = random.Random(seed)
    lengths = [0, 1, 2, chance.randint(3, 100), *(chance.randint(100, 600) for _ in range(3))]
    dtype = chance.choice(list(DTYPES.values()))
    sizes = chance.randint(1, 2), chance.choice(lengths), chance.choice(lengths)
    qkv, grad_out, grad_lse = random_qkv_and_grads(chance, device, dtype, *sizes)
    skip_unless_answered(device, dtype, qkv[0].shape[-1], qkv[2].shape[-1])
    mask, scale = random_mask(chance), chance.choice([None, 0.05, 0.4])
    inputs = [x.requires_grad_() for x in qkv]
    out, lse = run(*inputs, **mask, softmax_scale=scale)
    qkv = [x.detach() for x in qkv]
    right_scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
    assert_right(out.detach(), lse.detach(), *qkv, right_scale, **mask)
    grads = torch.autograd.grad(
        [out] if grad_lse is None else [out, lse],
        inputs,
        [grad_out] if grad_lse is None else [grad_out, grad_lse],
    )
    assert_gradients_right(grads, grad_out, grad_lse, *qkv, right_scale, **mask)


@pytest.mark.parametrize("head_dims", [(192, 128), (64, 128), (128, 64), (8, 256), (256, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims_of_v(device, head_dims, causal):
    skip_unless_answered(device, torch.bfloat16, *head_dims)
    q, k, _ = random_qkv(device, torch.bfloat16, 2, 150, 200, 4, 2, head_dims[0])
    _, v, _ = random_qkv(device, torch.bfloat16, 2, 150, 200, 4, 2, head_dims[1], seed=1)
    out, _ = check(q, k, v, causal)
    assert out.shape == (2, 150, 4, head_dims[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(257, 257), (130, 515), (300, 129)], ids=str)
def test_every_visible_key_has_its_weight(device, lengths, causal):
    """Scores are all 0 and V is one-hot: a row that sees n keys has 1 / n of each."""
    seqlen_q, seqlen_k = lengths
    skip_unless_answered(device, torch.float16, 8, 256)
    v = one_hot(seqlen_k, 0, 256, 256).to(device, torch.float16)
    q = torch.zeros(v.shape[0], seqlen_q, 2, 8, device=device, dtype=torch.float16)
    k = q.new_zeros(v.shape[0], seqlen_k, 1, 8)
    for window_size in WINDOWS:
        out = flash_attn_func(q, k, v, causal=causal, window_size=window_size)
        weights = by_token(out, 0, 256, seqlen_k)
        seen = visible(seqlen_q, seqlen_k, causal, window_size, device=device)
        right = (seen / seen.sum(-1, keepdim=True).clamp(min=1))[:, None]
        assert ((weights - right).abs() <= 1e-3 * right).all(), window_size


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(257, 257), (130, 515), (300, 129)], ids=str)
def test_every_pair_has_its_gradient(device, lengths, causal):
    """Scores are all 0 and dO is one-hot by query: dV holds P^T."""
    seqlen_q, seqlen_k = lengths
    dtype, error = (torch.float32, 1e-6) if device == "cpu" else (torch.float16, 1e-3)
    skip_unless_answered(device, dtype, 8, 256)
    grad_out = one_hot(seqlen_q, 0, 256, 256).to(device, dtype)
    q = torch.zeros(grad_out.shape[0], seqlen_q, 1, 8, device=device, dtype=dtype)
    k, v = q.new_zeros(q.shape[0], seqlen_k, 1, 8), q.new_zeros(q.shape[0], seqlen_k, 1, 256)
    v.requires_grad_()
    for window_size in WINDOWS[::2]:
        out = flash_attn_func(q, k, v, causal=causal, window_size=window_size)
        (grad_v,) = torch.autograd.grad(out, v, grad_out)
        seen = visible(seqlen_q, seqlen_k, causal, window_size, device=device)
        right = (seen / seen.sum(-1, keepdim=True).clamp(min=1)).mT[:, None]
        weights = by_token(grad_v, 0, 256, seqlen_q)
        assert ((weights - right).abs() <= error * right).all(), window_size


@pytest.mark.parametrize("window_size", [(20, 0), (20, 30), (-1, 5), (300, -1), (0, 0)], ids=str)
@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_what_a_window_hides_changes_no_bit(device, window_size, wild):
    """NaN in tokens of K and V, and in queries and their gradients, beside 0 in their place."""
    skip_unless_answered(device, torch.bfloat16)
    q, k, v = random_qkv(device, torch.bfloat16, 1, 400, 500, 4, 2, 64)
    grad_out = random_qkv(device, torch.bfloat16, 1, 400, 1, 4, 2, 64, seed=1)[0]
    keys, queries = [0, 99, 255, 256, 380, 499], [0, 128, 399]
    results = []
    for value in (0.0, wild):
        inputs = [x.clone() for x in (q, k, v, grad_out)]
        for x, tokens in zip(inputs, (queries, keys, keys, queries), strict=True):
            x[:, tokens] = value
        *qkv, grad = inputs
        qkv = [x.requires_grad_() for x in qkv]
        options = {"window_size": window_size, "deterministic": True}
        out, lse = flash_attn_func(*qkv, **options, return_lse=True)
        results.append((out, lse.mT, *torch.autograd.grad(out, qkv, grad)))
    seen = visible(400, 500, False, window_size, device=device)
    reached = seen[:, keys].any(-1)
    reached[queries] = True  # queries that see a spoilt key or are spoilt
    reached_keys = seen[reached].any(0)
    clean = (~reached, ~reached, ~reached, ~reached_keys, ~reached_keys)
    for right, result, rows in zip(*results, clean[: len(results[0])], strict=True):
        assert torch.equal(result[0, rows], right[0, rows])
        assert right.isfinite().logical_or(right == -math.inf).all()
    if window_size == (20, 0):
        assert all(rows.any() for rows in clean)


def test_blocks_out_of_sight_cost_nothing():
    """All products of a windowed call, forward and backward, are of blocks that it sees."""

    class Products(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.bmm.default:
                self.elements += result.numel()
            return result

    q, k, v = random_qkv("cpu", torch.float32, 1, 2048, 2048, 1, head_dim=8)
    counts = []
    for mask in (reference.Mask(), reference.Mask(100, 0)):
        with Products() as products:
            out, lse = reference.attention_forward(q, k, v, 0.1, mask)
            reference.attention_backward(out, None, q, k, v, out, lse, 0.1, mask)
        counts.append(products.elements)
    full, windowed = counts
    # Of 2048 keys a block of queries sees 100 and as many as it has queries.
    assert 0 < windowed < full * (100 + reference.QUERY_BLOCK) / 2048 * 1.3


# The operators' own arguments


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("diagonal", [-500, -70, -1, 0, 1, 33, 200, 700])
@pytest.mark.parametrize("limits", [(None, None), (40, None), (None, 10), (40, 10)], ids=str)
def test_diagonals(device, limits, diagonal, causal):
    """0 is top-left aligned; others are a part of a longer sequence's queries."""
    skip_unless_answered(device, torch.bfloat16, 40)
    q, k, v = random_qkv(device, torch.bfloat16, 1, 150, 300, 2, 1, 40)
    grad_out = random_qkv(device, torch.bfloat16, 1, 150, 300, 2, 1, 40, seed=1)[0]
    keywords = {"window_left": limits[0], "window_right": limits[1], "diagonal": diagonal}
    window_size = tuple(-1 if n is None else n for n in limits)
    mask = {"window_size": window_size, "diagonal": diagonal}
    out, lse = flash_attn_forward(q, k, v, 0.2, causal, **keywords)
    assert_right(out, lse, q, k, v, 0.2, causal, **mask)
    tensors = (grad_out, None, q, k, v, out, lse)
    grads = flash_attn_backward(*tensors, 0.2, causal, False, **keywords)
    assert_gradients_right(grads, grad_out, None, q, k, v, 0.2, causal, **mask)


def test_parts_of_a_sequence_are_its_rows(device):
    """As context parallelism has them: each rank's queries against all keys."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    skip_unless_answered(device, dtype, 32)
    q, k, v = random_qkv(device, dtype, 1, 300, 300, 2, 1, 32)
    whole, lse = flash_attn_func(q, k, v, 0.2, window_size=(70, 0), return_lse=True)
    for start, stop in itertools.pairwise([0, 1, 100, 228, 300]):
        part, part_lse = flash_attn_forward(
            q[:, start:stop], k, v, 0.2, True, window_left=70, diagonal=start
        )
        torch.testing.assert_close(part, whole[:, start:stop])
        torch.testing.assert_close(part_lse, lse[:, :, start:stop])
