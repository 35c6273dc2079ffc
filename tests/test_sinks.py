"""Sinks: scores beside those of the keys, one for each head, against their definition in fp64."""

import math
import random

import pytest
import torch
from oracle import Attention, assert_rows
from packed import assert_packed_right, random_grads, random_packed
from parity import (
    assert_gradients_right,
    assert_right,
    random_mask,
    random_qkv,
    skip_unless_answered,
)
from torch import func
from torch.utils.checkpoint import checkpoint

import cute_kernels
from cute_kernels import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from cute_kernels.operators import (
    flash_attn_backward,
    flash_attn_forward,
    flash_attn_varlen_backward,
    flash_attn_varlen_forward,
)

OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
SINK_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dtype_on(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


def some_sinks(heads, device, dtype=torch.float32, seed=0, far=True):
    """Near the LSE of random rows; if `far`, also none and beyond every exponential."""
    generator = torch.Generator(device).manual_seed(seed)
    sinks = 3 * torch.randn(heads, generator=generator, device=device) + 3
    if far:
        sinks[0] = -math.inf
        sinks[1] = 300.0
        sinks[2] = -300.0
    return sinks.to(dtype)


def run(q, k, v, sinks, grads=None, **options):
    """Output, LSE and, if there are `grads`, the gradients of q, k, v and the sinks."""
    inputs = [x.detach().requires_grad_(grads is not None) for x in (q, k, v, sinks)]
    out, lse = flash_attn_func(*inputs[:3], sinks=inputs[3], return_lse=True, **options)
    if grads is None:
        return out, lse
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, grads)


def grads_of(q, v, seed=5):
    generator = torch.Generator(q.device).manual_seed(seed)
    shape = (*q.shape[:3], v.shape[3])
    grad_out = torch.randn(shape, generator=generator, device=q.device).to(q.dtype)
    batch, seqlen, heads, _ = q.shape
    return grad_out, torch.randn(batch, heads, seqlen, generator=generator, device=q.device)


def assert_all_right(results, q, k, v, sinks, grads, causal=False, **mask):
    scale = q.shape[-1] ** -0.5
    assert_right(*results[:2], q, k, v, scale, causal, sinks=sinks, **mask)
    assert_gradients_right(results[2:], *grads, q, k, v, scale, causal, sinks=sinks, **mask)
    exact = Attention(q, k, v, scale, causal, sinks=sinks, **mask)
    assert results[5].dtype == sinks.dtype
    right, allowed = exact.sinks_gradient(*grads, sinks.dtype)
    assert_rows("gradient of sinks", results[5][:, None], right[:, None], allowed)


@pytest.mark.parametrize("seed", range(12))
def test_dense_calls(device, seed):
    chance = random.Random(seed)
    head_dim = chance.choice([64, 64, 40] if device == "cpu" else [64, 128, 256, 96])
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, head_dim)
    heads = chance.choice([(4, 4), (8, 2), (4, 1)])
    seqlens = [chance.choice([1, 5, 64, 130, 200, 333]) for _ in range(2)]
    q, k, v = random_qkv(device, dtype, 2, *seqlens, *heads, head_dim, seed)
    sinks = some_sinks(heads[0], device, chance.choice(SINK_DTYPES), seed)
    mask, grads = random_mask(chance), grads_of(q, v)
    results = run(q, k, v, sinks, grads, deterministic=chance.random() < 0.5, **mask)
    assert_all_right(results, q, k, v, sinks, grads, **mask)


@pytest.mark.parametrize("seed", range(8))
def test_packed_calls(device, seed):
    """Rows that no sequence uses have no sink, and nothing of their NaN arrives anywhere."""
    chance = random.Random(100 + seed)
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    slots_q, slots_k = ([chance.choice([0, 1, 30, 64, 150]) for _ in range(5)] for _ in "qk")
    packed = random_packed(chance, device, dtype, slots_q, slots_k, (64, 64), (4, 2), True, 70)
    sinks = some_sinks(4, device, chance.choice(SINK_DTYPES), seed)
    mask, grads = random_mask(chance), random_grads(packed)
    spoilt = packed.spoilt(math.nan)
    inputs = [x.requires_grad_() for x in (*spoilt.qkv, sinks)]
    out, lse = flash_attn_varlen_func(
        *inputs[:3], **packed.lengths(), sinks=inputs[3], return_lse=True, **mask
    )
    results = [out.detach(), lse.detach()]
    variant = {"sinks": sinks.detach(), **mask}
    of_q, _ = packed.unused()
    grad_out = grads[0].masked_fill(of_q[:, None, None], math.nan)
    grad_lse = grads[1].masked_fill(of_q, math.nan)
    results += torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    assert_packed_right(results, packed, grads, **variant)
    right = torch.zeros(4, dtype=torch.float64, device=device)
    allowed = torch.zeros_like(right)
    for of_q, of_k in packed.sequences():
        parts = [x[None, rows] for x, rows in zip(packed.qkv, (of_q, of_k, of_k), strict=True)]
        exact = Attention(*parts, 64**-0.5, **{"causal": False, **variant})
        of_rows = grads[0][None, of_q], grads[1][None, :, of_q]
        part, off = exact.sinks_gradient(*of_rows, sinks.dtype)
        right, allowed = right + part, allowed + off
    allowed += torch.finfo(sinks.dtype).eps * right.abs()
    assert_rows("gradient of sinks", results[5][:, None], right[:, None], allowed)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_without_keys_see_their_sink(device, deterministic):
    """Without any key, and behind a mask."""
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    for seqlen_k, causal in [(0, False), (30, True)]:
        q, k, v = random_qkv(device, dtype, 2, 100, seqlen_k, 4, 2)
        sinks = some_sinks(4, device)
        grads = grads_of(q, v)
        results = run(q, k, v, sinks, grads, causal=causal, deterministic=deterministic)
        unseen = slice(0, 100 - seqlen_k)
        assert not results[0][:, unseen].any()
        torch.testing.assert_close(
            results[1][:, :, unseen], sinks[:, None].expand(2, 4, 100 - seqlen_k)
        )
        assert_all_right(results, q, k, v, sinks, grads, causal=causal)


def test_no_sink_is_no_sinks(device):
    """-inf: the same bits as without the argument, where the same kernel answers."""
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    q, k, v = random_qkv(device, dtype, 2, 150, 170, 4, 2)
    none = torch.full((4,), -math.inf, device=device)
    window = {"window_size": (40, 0)}  # of a row that takes any call
    with_none = run(q, k, v, none, **window)
    without = flash_attn_func(q, k, v, return_lse=True, **window)
    assert all(torch.equal(a, b) for a, b in zip(with_none, without, strict=True))


@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0, 3000.0])
def test_sinks_far_from_the_scores(device, shift):
    """Keys of one score, far above or below the sinks: a sink is what such a key would be."""
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    q, k, v = random_qkv(device, dtype, 1, 70, 90, 4)
    q[..., 0], k[..., 0] = 8.0, shift  # adds `shift` to every score
    sinks = torch.tensor([shift - 100, shift - 8, shift, shift + 100], device=device)
    grads = grads_of(q, v)
    results = run(q, k, v, sinks, grads)
    assert_all_right(results, q, k, v, sinks, grads)


def test_huge_and_odd_sinks(device):
    """NaN stays in its head; the largest numbers leave nothing to the keys."""
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    q, k, v = random_qkv(device, dtype, 1, 70, 90, 4)
    sinks = torch.tensor([math.nan, 3e38, -3e38, 1.0], device=device)
    grads = grads_of(q, v)
    out, lse, *gradients = run(q, k, v, sinks, grads)
    assert out[:, :, 0].isnan().all() and lse[:, 0].isnan().all()
    assert not out[:, :, 1].any()
    assert (lse[:, 1] == 3e38).all()
    assert not any(gradient[:, :, 1].any() for gradient in gradients[:3])
    torch.testing.assert_close(gradients[3][1], grads[1][:, 1].sum(), rtol=1e-4, atol=1e-3)
    scale = q.shape[-1] ** -0.5
    qkv = [x[:, :, 2:] for x in (q, k, v)]
    assert_right(out[:, :, 2:], lse[:, 2:], *qkv, scale, False, sinks=sinks[2:])
    parts = [gradient[:, :, 2:] for gradient in gradients[:3]]
    of_heads = grads[0][:, :, 2:], grads[1][:, 2:]
    assert_gradients_right(parts, *of_heads, *qkv, scale, False, sinks=sinks[2:])


def test_queries_without_keys_are_nobodys_nan(device):
    """Their LSE is the sink, which tells nothing of what is in the query."""
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    q, k, v = random_qkv(device, dtype, 1, 150, 90, 4)
    sinks, grads = some_sinks(4, device), grads_of(q, v)
    clean = run(q, k, v, sinks, grads, causal=True)
    q[:, :60] = math.nan  # all before the first key
    spoilt = run(q, k, v, sinks, grads, causal=True)
    for result, expected in zip(spoilt, clean, strict=True):
        torch.testing.assert_close(result, expected)


def test_gradients_are_the_same_bits(device):
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    q, k, v = random_qkv(device, dtype, 2, 700, 500, 8, 2)
    sinks, grads = some_sinks(8, device), grads_of(q, v)
    first = run(q, k, v, sinks, grads, causal=True, deterministic=True)
    for _ in range(3):
        again = run(q, k, v, sinks, grads, causal=True, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_by_differences():
    q, k, v = (x.double() for x in random_qkv("cpu", torch.float64, 1, 5, 7, 2, 1, 8))
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, sinks)]

    def call(q, k, v, sinks):
        return flash_attn_func(q, k, v, causal=True, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(call, inputs)


def test_only_the_sinks_have_a_gradient(device):
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    q, k, v = random_qkv(device, dtype, 1, 20, 30, 4)
    sinks = some_sinks(4, device, torch.bfloat16).requires_grad_()
    flash_attn_func(q, k, v, sinks=sinks).sum().backward()
    assert sinks.grad.dtype == torch.bfloat16
    assert sinks.grad.isfinite().all() and sinks.grad[3] != 0


def test_other_layouts_of_sinks(device):
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    q, k, v = random_qkv(device, dtype, 1, 20, 30, 4)
    sinks, grads = some_sinks(4, device, far=False), grads_of(q, v)
    first = run(q, k, v, sinks, grads)
    apart = torch.stack([sinks, sinks], -1)[:, 0]
    for a, b in zip(first, run(q, k, v, apart, grads), strict=True):
        torch.testing.assert_close(a, b)
    one = torch.tensor(0.5, device=device).expand(4)
    assert_all_right(run(q, k, v, one, grads), q, k, v, one, grads)


def test_all_functions_take_them(device):
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    qkv = torch.stack(random_qkv(device, dtype, 2, 40, 40, 4), 2)
    sinks = some_sinks(4, device)
    right = flash_attn_func(*qkv.unbind(2), causal=True, sinks=sinks)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True, sinks=sinks), right)
    starts = torch.tensor([0, 40, 80], dtype=torch.int32, device=device)
    packed = cute_kernels.flash_attn_varlen_qkvpacked_func(
        qkv.flatten(0, 1), starts, causal=True, sinks=sinks
    )
    torch.testing.assert_close(packed.unflatten(0, (2, 40)), right)


# PyTorch's machinery


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    q, k, v = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, 16)
    sinks = some_sinks(4, "cpu", torch.bfloat16, far=False)
    tensors = [x.requires_grad_(requires_grad) for x in (q, k, v, sinks)]
    calls = [(flash_attn_forward, (*tensors[:3], 0.3, True, None, False, tensors[3]))]
    lengths = [torch.tensor([0, 9, 20], dtype=torch.int32)] * 2
    packed = (*(x[0] for x in tensors[:3]), *lengths, None, None, None, 0.3, True, tensors[3])
    calls.append((flash_attn_varlen_forward, packed))
    if not requires_grad:
        results = [operator(*inputs) for operator, inputs in calls]
        options = (0.3, True, False, None, sinks)
        grads = [(torch.randn_like(out), torch.randn_like(lse)) for out, lse in results]
        calls.append((flash_attn_backward, (*grads[0], q, k, v, *results[0], *options)))
        inputs = (*grads[1], *packed[:3], *results[1], *packed[3:])
        calls.append((flash_attn_varlen_backward, inputs))
    for operator, inputs in calls:
        result = torch.library.opcheck(operator, inputs, test_utils=OPCHECK)
        assert set(result.values()) == {"SUCCESS"}


def loss_of(q, k, v, sinks):
    out, lse = flash_attn_func(q, k, v, causal=True, sinks=sinks * 2, return_lse=True)
    return out.float().square().sum() + lse.sin().sum()


def test_compiles_whole_and_recomputes():
    tensors = [x.float() for x in random_qkv("cpu", torch.float32, 2, 20, 20, 4, 2, 16)]
    tensors.append(some_sinks(4, "cpu", far=False))
    inputs = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=False)
    again = checkpoint(loss_of, *inputs, use_reentrant=False)
    for loss in (compiled(*inputs), again):
        for a, b in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_of_each_sample(device):
    """Of sinks that all samples share; those of each sample's own have no rule."""
    dtype = dtype_on(device)
    skip_unless_answered(device, dtype, 64)
    q, k, v = (x.unflatten(0, (3, 1)) for x in random_qkv(device, dtype, 3, 20, 20, 4))
    sinks = some_sinks(4, device, far=False)
    gradient = func.grad(loss_of, (0, 3))
    mapped = func.vmap(gradient, (0, 0, 0, None))(q, k, v, sinks)
    for i in range(3):
        for a, b in zip(mapped, gradient(q[i], k[i], v[i], sinks), strict=True):
            torch.testing.assert_close(a[i], b, rtol=2e-2, atol=2e-2)
    with pytest.raises(NotImplementedError, match="vmap over sinks"):
        func.vmap(loss_of)(q, k, v, sinks.expand(3, 4))


# What is refused


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda s: s[:3], ValueError, r"sinks has shape \(3,\), must be \(heads,\) = \(4,\)"),
        (lambda s: s[None], ValueError, r"sinks has shape \(1, 4\)"),
        (lambda s: s.int(), TypeError, "sinks has dtype torch.int32, must be float16 or bfloat16"),
        (lambda s: 1.0, TypeError, "sinks is a float, must be a torch.Tensor"),
        (lambda s: s.to("meta"), ValueError, "sinks is on meta, must be on"),
        (lambda s: s.to_sparse(), TypeError, "sinks has layout torch.sparse_coo"),
    ],
)
def test_wrong_sinks_are_named(device, make, error, message, packed):
    q, k, v = random_qkv(device, dtype_on(device), 1, 20, 20, 4)
    starts = torch.tensor([0, 20], dtype=torch.int32, device=device)
    sinks = make(torch.ones(4, device=device))
    function, inputs = flash_attn_func, (q, k, v)
    if packed:
        function, inputs = flash_attn_varlen_func, (q[0], k[0], v[0], starts, starts)
    with pytest.raises(error, match=message):
        function(*inputs, sinks=sinks)


def test_forward_mode_is_refused():
    q, k, v = random_qkv("cpu", torch.float32, 1, 5, 5, 4)
    sinks = torch.zeros(4)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        func.jvp(lambda s: flash_attn_func(q, k, v, sinks=s), (sinks,), (torch.ones(4),))
