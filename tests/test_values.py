"""Values far from N(0, 1): huge, tiny, all alike, zero. The results are those of the definition."""

import math

import pytest
import torch
from oracle import Attention, assert_rows, visible
from parity import (
    BACKWARD_KERNELS,
    DTYPES,
    FORWARD_KERNELS,
    assert_gradients_right,
    assert_right,
    random_qkv,
)

from cute_kernels import flash_attn_func

SEQLENS = [(1, 1), (1, 200), (130, 70), (300, 300)]
# Kernels take at most 2^127 = 1.70e38, and what is below 2^-100 for that
SCALES = [5e-39, 1e-45, 1e-38, 2.0**-100, 1e10]
# Products of q and k are exact in fp32 up to here: a bf16 has 8 bits, 133120 is 2^17 + 2^11
ALIKE = [(30000.0, "bf16"), (30000.0, "fp16"), (133120.0, "bf16"), (1e15, "bf16")]


def everywhere(kernel, value, seqlen, heads, head_dim=None):
    head_dim = kernel.head_dim if head_dim is None else head_dim
    options = {"device": kernel.device, "dtype": kernel.dtype}
    return torch.full((2, seqlen, heads, head_dim), value, **options)


def drawn(kernel, seqlen_q, seqlen_k, seed=0):
    sizes = 2, seqlen_q, seqlen_k, kernel.heads, kernel.key_heads, kernel.head_dim
    return random_qkv(kernel.device, kernel.dtype, *sizes, seed)


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_tokens_that_are_all_alike_have_their_value(kernel):
    for value, dtype in ALIKE:
        if DTYPES[dtype] != kernel.dtype:
            continue
        for seqlen_q, seqlen_k in [(1, 1), (1, 2), (3, 3), (1, 200), (300, 300), (129, 513)]:
            q = everywhere(kernel, value, seqlen_q, kernel.heads)
            k = everywhere(kernel, value, seqlen_k, kernel.key_heads)
            out, lse = kernel.forward(q, k, k)
            assert (out == q).all(), (value, seqlen_q, seqlen_k)
            score = k[0, 0, 0, 0].double().item() ** 2 * kernel.head_dim**0.5
            if score < 1e38:
                assert (lse.double() / score - 1).abs().max() < 2**-16


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_zeros(kernel):
    """Zero scores give the mean of V, zero values give 0."""
    for seqlen_q, seqlen_k in SEQLENS:
        q, k, v = drawn(kernel, seqlen_q, seqlen_k)
        zero_q, zero = torch.zeros_like(q), torch.zeros_like(k)
        for inputs in ((zero_q, k, v), (q, zero, v), (zero_q, zero, v)):
            out, lse = kernel.forward(*inputs)
            assert_right(out, lse, *inputs, kernel.head_dim**-0.5, **kernel.mask)
        assert not kernel.forward(q, k, zero)[0].any()


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_values_of_any_size(kernel):
    """The output scales with V. P V is divided by the sum of P last: at most 300 here."""
    sizes = {torch.bfloat16: [1e-20, 1e30, 1e35], torch.float16: [1e-3, 1e4]}
    for size in sizes[kernel.dtype]:
        for seqlen_q, seqlen_k in SEQLENS:
            q, k, v = drawn(kernel, seqlen_q, seqlen_k)
            v = (v * size).contiguous()
            out, lse = kernel.forward(q, k, v)
            assert_right(out, lse, q, k, v, kernel.head_dim**-0.5, **kernel.mask)


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_huge_values_where_scores_rise_or_fall(kernel):
    """P is relative to a maximum of the row: no sum of P V is far above the output."""
    value = 1e31 if kernel.dtype == torch.bfloat16 else 3e4
    for of_last in (0.0, 20.0, 40.0):
        options = {"device": kernel.device, "dtype": kernel.dtype}
        q = torch.zeros(1, 1024, kernel.heads, kernel.head_dim, **options)
        k = q[:, :, : kernel.key_heads].clone()
        q[..., 0], k[..., 0] = 8.0, 20.0
        k[:, -128:, :, 0] = of_last
        out, _ = kernel.forward(q, k, torch.full_like(k, value), softmax_scale=0.125)
        assert ((out.double() / value - 1).abs() < 0.01).all(), of_last


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_one_huge_score_among_small_ones(kernel):
    """The key that has it is all there is, wherever it stands; rows before it do not notice."""
    q, k, v = drawn(kernel, 300, 300)
    q[..., 0] = 100.0
    k[..., 0] = 0.0
    for at in (0, 63, 64, 150, 299):
        one = k.clone()
        one[:, at, :, 0] = 1000.0
        out, lse = kernel.forward(q, one, v)
        assert_right(out, lse, q, one, v, kernel.head_dim**-0.5, **kernel.mask)
        sees = visible(300, 300, **kernel.mask, device=out.device)[:, at]
        right = v[:, at : at + 1].repeat_interleave(kernel.group, dim=2).expand_as(out)
        assert torch.equal(out[:, sees], right[:, sees])


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_keys_of_minus_infinity(kernel):
    """Their weight is 0, like that of keys that are not there."""
    q, k, v = drawn(kernel, 200, 300)
    q[..., 0] = q[..., 0].abs() + 0.1
    for keys in (slice(0, 1), slice(0, 150), slice(101, 299), slice(299, 300)):
        some = k.clone()
        some[:, keys, :, 0] = -math.inf
        out, lse = kernel.forward(q, some, v)
        assert_right(out, lse, q, some, v, kernel.head_dim**-0.5, **kernel.mask)


def for_scale(kernel, scale, seqlen_q, seqlen_k):
    """q, k and v whose scores are numbers of fp32, also when they are scaled."""
    q, k, v = drawn(kernel, seqlen_q, seqlen_k)
    if scale > 1:  # scores of 100
        if kernel.dtype == torch.float16:
            pytest.skip("fp16 has no q that small")
        q = (q.double() * 2.0**-30).to(q.dtype)
    return q, k, v


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_scales_at_the_ends_of_a_float(kernel, scale):
    for seqlen_q, seqlen_k in SEQLENS:
        q, k, v = for_scale(kernel, scale, seqlen_q, seqlen_k)
        out, lse = kernel.forward(q, k, v, softmax_scale=scale)
        assert_right(out, lse, q, k, v, scale, **kernel.mask)


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_a_scale_that_leaves_one_key(kernel):
    """Scaled scores beyond a float: the key of the largest score is all there is."""
    q, k, v = drawn(kernel, 100, 130)
    out, _ = kernel.forward(q, k, v, softmax_scale=3e38)
    exact = Attention(q, k, v, 3e38, **kernel.mask)
    assert torch.equal(out.double(), exact.out)
    without = torch.full((q.shape[2],), -math.inf, device=q.device)
    call = {"causal": kernel.causal, "window_size": kernel.window_size, "sinks": without}
    out = flash_attn_func(q, k, v, softmax_scale=3e38, **call)
    assert torch.equal(out.double(), exact.out)


def backward(kernel, q, k, v, grad_out, scale):
    """Gradients after a forward pass of the same device, which chooses its row itself."""
    call = {"softmax_scale": scale, "causal": kernel.causal, "return_lse": True}
    out, lse = flash_attn_func(q, k, v, **call)
    return kernel.backward(grad_out, None, q, k, v, out, lse, scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
def test_gradients_with_scales_at_the_ends_of_a_float(kernel, scale):
    for seqlen_q, seqlen_k in SEQLENS:
        q, k, v = for_scale(kernel, scale, seqlen_q, seqlen_k)
        grad_out, _, _ = drawn(kernel, seqlen_q, 0, seed=1)
        grads = backward(kernel, q, k, v, grad_out, scale)
        exact = Attention(q, k, v, scale, kernel.causal).gradients(grad_out)
        for name, grad, (right, allowed) in zip("qkv", grads, exact, strict=True):
            if name != "v" and scale < 1e-30:  # of the size of denormal numbers
                assert grad.float().abs().max() < 1e-28
            elif right.abs().max() < torch.finfo(q.dtype).max:  # 3e38 and more are not numbers
                assert_rows(f"gradient of {name}", grad, right, allowed)


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
def test_gradients_of_tokens_that_are_all_alike(kernel):
    """One fp32 LSE tells tokens of value 100 to 5%; from 1000 on nothing is promised but that no P
    is above 1."""
    for value, seqlen_q, seqlen_k in [
        (size, *seqlens) for size in (100.0, 1000.0, 10000.0) for seqlens in SEQLENS
    ]:
        q, k = everywhere(kernel, value, seqlen_q, 4), everywhere(kernel, value, seqlen_k, 2)
        grad_out = torch.rand_like(q) + 0.5
        out, lse = flash_attn_func(q, k, k, causal=kernel.causal, return_lse=True)
        v = torch.ones_like(k)  # dP = delta but for rounding: dS is 0
        out = torch.ones_like(out).masked_fill(lse.transpose(1, 2)[..., None] == -math.inf, 0.0)
        scale = kernel.head_dim**-0.5
        grads = kernel.backward(grad_out, None, q, k, v, out, lse, scale)
        assert all(grad.isfinite().all() for grad in grads), (value, seqlen_q, seqlen_k)
        exact = Attention(q, k, v, scale, kernel.causal)
        seen = ~exact.unseen.transpose(1, 2)[..., None]
        most = (grad_out.double().abs() * seen).unflatten(2, (2, 2)).sum((1, 3))  # batch, key head
        grad_v = grads[2].double()
        assert (grad_v.abs() <= 1.01 * most[:, None]).all(), (value, seqlen_q, seqlen_k)
        if value == 100.0:
            right = exact.gradients(grad_out)[2][0]
            assert ((grad_v - right).abs() <= 0.05 * right.abs()).all(), (seqlen_q, seqlen_k)


@pytest.mark.parametrize("scale", [1e6, 1e7, 1e8])
@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
def test_no_probability_is_above_1_at_large_scales(kernel, scale):
    """One fp32 LSE does not tell scores of 1e8 apart: P may be anything from 0 to 1."""
    for seqlen_q, seqlen_k in SEQLENS:
        q, k, v = drawn(kernel, seqlen_q, seqlen_k)
        grad_out, _, _ = drawn(kernel, seqlen_q, 0, seed=1)
        out, lse = flash_attn_func(
            q, k, v, softmax_scale=scale, causal=kernel.causal, return_lse=True
        )
        grad_v = kernel.backward(grad_out, None, q, k, v, out, lse, scale)[2].double()
        group = q.shape[2] // k.shape[2]
        most = grad_out.double().abs().unflatten(2, (-1, group)).sum((1, 3))
        assert grad_v.isfinite().all(), (seqlen_q, seqlen_k)
        assert (grad_v.abs() <= 1.01 * most[:, None]).all(), (seqlen_q, seqlen_k)


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
def test_gradients_of_other_sizes(kernel):
    """Zeros; tiny and huge V and dO; one huge score."""
    scale = kernel.head_dim**-0.5
    sizes = {torch.bfloat16: [0.0, 1e-12, 1e12], torch.float16: [0.0, 1e-2, 1e2]}
    for seqlen_q, seqlen_k in SEQLENS:
        q, k, v = drawn(kernel, seqlen_q, seqlen_k)
        grad_out, _, _ = drawn(kernel, seqlen_q, 0, seed=1)
        for size in sizes[kernel.dtype]:
            for inputs in (
                (q, k, v * size, grad_out),
                (q, k, v, grad_out * size),
                (q * min(size, 1.0), k, v, grad_out),
            ):
                *qkv, grad = inputs
                grads = backward(kernel, *qkv, grad, scale)
                assert_gradients_right(grads, grad, None, *qkv, scale, kernel.causal)
        q[..., 0], k[..., 0] = 100.0, 0.0
        k[:, seqlen_k // 2, :, 0] = 1000.0
        grads = backward(kernel, q, k, v, grad_out, scale)
        assert_gradients_right(grads, grad_out, None, q, k, v, scale, kernel.causal)
