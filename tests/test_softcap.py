"""Softcap: scores become softcap * tanh(score / softcap) before the mask; rows against fp64."""

import math
import random

import pytest
import torch
from oracle import Attention
from packed import assert_packed_right, random_grads, random_packed
from parity import (
    DTYPES,
    assert_gradients_right,
    assert_right,
    common_head_dim,
    random_mask,
    random_qkv,
    skip_unless_answered,
)

from cute_kernels import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    tile_configs,
)
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
)
ROWS = [pytest.param(row, id=row["name"]) for row in tile_configs("forward") if row["softcap"]]
BACKWARD_ROWS = [
    pytest.param(row, id=row["name"]) for row in tile_configs("backward") if row["softcap"]
]


def on(device, head_dim=64):
    """The dtype to call with; skips where the build has no kernel."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    skip_unless_answered(device, dtype, head_dim, softcap=True)
    return dtype


def check(q, k, v, softcap, causal=False, sinks=None, deterministic=False, **mask):
    """Output, LSE and gradients of one call."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    options = {"softcap": softcap, "sinks": sinks, "causal": causal, "deterministic": deterministic}
    out, lse = flash_attn_func(*inputs, return_lse=True, **options, **mask)
    variant = {"softcap": softcap, "sinks": sinks, **mask}
    scale = q.shape[-1] ** -0.5
    assert_right(out.detach(), lse.detach(), q, k, v, scale, causal, **variant)
    grads = torch.randn_like(out), torch.randn_like(lse)
    results = torch.autograd.grad((out, lse), inputs, grads)
    assert_gradients_right(results, *grads, q, k, v, scale, causal, **variant)


@pytest.mark.parametrize("seed", range(12))
def test_dense_calls(device, seed):
    chance = random.Random(seed)
    head_dim = chance.choice([64, 40] if device == "cpu" else [64, 128, 256, 96])
    dtype = on(device, head_dim)
    heads = chance.choice([(4, 4), (8, 2), (4, 1)])
    seqlens = [chance.choice([1, 5, 64, 130, 200, 333]) for _ in range(2)]
    q, k, v = random_qkv(device, dtype, 2, *seqlens, *heads, head_dim, seed)
    sinks = torch.randn(heads[0], device=device) if chance.random() < 0.5 else None
    softcap = chance.choice([0.5, 2.0, 20, 50.0, 300.0])
    check(q * chance.choice([1, 1, 8]), k, v, softcap, sinks=sinks, **random_mask(chance))


@pytest.mark.parametrize("seed", range(6))
def test_packed_calls(device, seed):
    chance = random.Random(100 + seed)
    dtype = on(device)
    slots_q, slots_k = ([chance.choice([0, 1, 30, 64, 150]) for _ in range(5)] for _ in "qk")
    packed = random_packed(chance, device, dtype, slots_q, slots_k, (64, 64), (4, 2), True, 70)
    variant = {"softcap": 3.0, "sinks": torch.randn(4, device=device), **random_mask(chance)}
    grads = random_grads(packed)
    results = packed.gradients(*grads, **variant)
    assert_packed_right(results, packed, grads, **variant)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_table(hopper, row):
    """Lengths around the row's tiles; scores near and far from 0, rising and falling."""
    head_dim, m, n = common_head_dim(row), row["tile_m"], row["tile_n"]
    scale = head_dim**-0.5
    for lengths in [(m + 1, 5 * n - 1), (700, 300), (300, 900), (1, n)]:
        q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, *lengths, 4, 2, head_dim)
        rising = torch.linspace(0.1, 12, lengths[1], device=hopper)[:, None, None]
        for keys in (k, k * rising, k * rising.flip(0)):
            for softcap in (0.7, 50.0):
                for causal in (False, True):
                    options = {"softcap": softcap, "causal": causal, "window_size": (400, -1)}
                    out, lse = flash_attn_func(
                        q, keys.to(k.dtype), v, return_lse=True, tile_config=row["name"], **options
                    )
                    assert_right(out, lse, q, keys.to(k.dtype), v, scale, **options)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("row", BACKWARD_ROWS)
def test_every_backward_row(hopper, row, deterministic):
    """Lengths around the row's tiles, windows, NaN that a mask hides (a careful kernel's work)."""
    head_dim, n, dtype = row["head_dim"], row["tile_n"], DTYPES[row["dtype"]]
    scale = head_dim**-0.5
    for lengths in [(65, 5 * n - 1), (700, 300), (300, 900), (1, n)]:
        q, k, v = random_qkv(hopper, dtype, 2, *lengths, 4, 2, head_dim)
        grad_out = random_qkv(hopper, dtype, 2, *lengths, 4, 2, head_dim, seed=1)[0]
        for softcap, left, spoilt in [(0.7, None, False), (50.0, 200, False), (3.0, 200, True)]:
            if spoilt:
                k[:, lengths[1] // 2], v[:, lengths[1] // 3] = math.nan, math.inf
                grad_out[:, lengths[0] // 2] = math.nan
            keywords = {"window_left": left, "softcap": softcap}
            out, lse = flash_attn_forward(q, k, v, scale, True, **keywords)
            tensors = (grad_out, None, q, k, v, out, lse)
            options = (scale, True, deterministic, row["name"])
            grads = flash_attn_backward(*tensors, *options, **keywords)
            variant = {"window_size": (-1 if left is None else left, -1), "softcap": softcap}
            assert_gradients_right(grads, grad_out, None, q, k, v, scale, True, **variant)


@pytest.mark.parametrize("softcap", [1e-30, 1e-3, 1.0, 1e4, 1e30, 3e38])
@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0])
def test_softcaps_of_every_size(device, softcap, size):
    """From all scores alike to none changed, however small these are beside it. One far above the
    others has a block looked at again."""
    q, k, v = random_qkv(device, on(device), 1, 300, 700, 4)
    q = (q * size).to(q.dtype)
    check(q, k, v, softcap)
    if size <= 1:
        k[:, 5] *= 20
        check(q, k, v, softcap)


def test_lse_is_near(device):
    """1e-3, where scores are up to half of a softcap of 50, and where they are flat."""
    q, k, v = random_qkv(device, on(device), 1, 200, 300, 4)
    for size in (1.0, 5.0, 100.0):
        large = (q * size).to(q.dtype)
        _, lse = flash_attn_func(large, k, v, softcap=50.0, return_lse=True)
        exact = Attention(large, k, v, 0.125, False, softcap=50.0).lse
        assert (lse - exact).abs().max() < 1e-3


def test_what_is_not_finite(device):
    """Infinite products are the softcap; NaN is NaN, and nothing behind a mask."""
    q, k, v = random_qkv(device, on(device), 1, 100, 100, 2)
    k[:, 50, 0] = math.nan
    v[:, 60] = math.nan
    check(q, k, v, 3.0, causal=True)
    q, k, v = random_qkv(device, on(device), 1, 20, 20, 1)
    q[..., 0], k[:, ::2, :, 0], k[:, 1::2, :, 0] = 1.0, math.inf, -math.inf
    out, lse = flash_attn_func(q, k, v, softcap=2.0, return_lse=True)
    right = math.log(10 * math.exp(2) + 10 * math.exp(-2))
    torch.testing.assert_close(lse, torch.full_like(lse, right))
    weights = torch.tensor([math.exp(2), math.exp(-2)], device=device, dtype=torch.float64)
    mean = (weights.repeat(10)[:, None] * v[0, :, 0].double()).sum(0) / math.exp(right)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if device == "cuda" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out[0, 0, 0].double(), mean, **tolerance)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_an_infinite_query_and_keys_that_it_does_not_see(device, head_dim):
    """Its LSE and output are finite. Other gradients are the same bits as with 0 in its place.
    With a softcap this small no block is near 0, where tanh is another polynomial."""
    q, k, v = random_qkv(device, on(device, head_dim), 1, 100, 100, 2, head_dim=head_dim)
    k[..., 5] = k[..., 5].abs() + 0.1
    grad_out = torch.randn_like(q)
    results = []
    for inside in (0.0, math.inf):
        q[:, 0, 0, 5] = inside
        out, lse = flash_attn_forward(q, k, v, 0.1, True, softcap=0.5)
        assert out.isfinite().all() and lse.isfinite().all()
        inputs = (grad_out, None, q, k, v, out, lse, 0.1, True, True)
        results.append(flash_attn_backward(*inputs, softcap=0.5)[:3])
    for of, right, grad in zip("qkv", *results, strict=True):  # query 0 sees key 0
        same = grad == right
        same[:, 0, 0] = True
        assert same.all(), f"gradient of {of}: {(~same).nonzero()[:5].tolist()} differ"


def test_none_is_none(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = random_qkv(device, dtype)
    expected = flash_attn_func(q, k, v)
    for none in (0, 0.0):
        assert torch.equal(flash_attn_func(q, k, v, softcap=none), expected)


def test_all_functions_take_it(device):
    qkv = torch.stack(random_qkv(device, on(device), 2, 40, 40, 4), 2)
    right = flash_attn_func(*qkv.unbind(2), causal=True, softcap=2.0)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True, softcap=2.0), right)
    starts = torch.tensor([0, 40, 80], dtype=torch.int32, device=device)
    q, k, v = (x.flatten(0, 1) for x in qkv.unbind(2))
    packed = flash_attn_varlen_func(q, k, v, starts, starts, causal=True, softcap=2.0)
    torch.testing.assert_close(packed.unflatten(0, (2, 40)), right)


def test_gradients_by_differences():
    inputs = [x.requires_grad_() for x in random_qkv("cpu", torch.float64, 1, 5, 7, 2, 1, 8)]

    def call(q, k, v):
        return flash_attn_func(q, k, v, causal=True, softcap=0.8, return_lse=True)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    q, k, v = (
        x.requires_grad_(requires_grad)
        for x in random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, 16)
    )
    lengths = [torch.tensor([0, 9, 20], dtype=torch.int32)] * 2
    packed = (q[0], k[0], v[0], *lengths, None, None, None, 0.3, True)
    calls = [(flash_attn_forward, (q, k, v, 0.3, True)), (flash_attn_varlen_forward, packed)]
    if not requires_grad:
        results = [operator(*inputs, softcap=1.5) for operator, inputs in calls]
        grads = [(torch.randn_like(out), torch.randn_like(lse)) for out, lse in results]
        calls.append((flash_attn_backward, (*grads[0], q, k, v, *results[0], 0.3, True, False)))
        inputs = (*grads[1], *packed[:3], *results[1], *packed[3:])
        calls.append((flash_attn_varlen_backward, inputs))
    for operator, inputs in calls:
        result = torch.library.opcheck(operator, inputs, {"softcap": 1.5}, test_utils=OPCHECK)
        assert set(result.values()) == {"SUCCESS"}


def loss_of(q, k, v):
    out, lse = flash_attn_func(q, k, v, causal=True, softcap=1.5, return_lse=True)
    return out.float().square().sum() + lse.sin().sum()


def test_compiles_whole_and_maps():
    inputs = [x.requires_grad_() for x in random_qkv("cpu", torch.float32, 2, 20, 20, 4, 2, 16)]
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=False)
    mapped = torch.func.vmap(torch.func.grad(loss_of, (0, 1, 2)))(*(x[:, None] for x in inputs))
    results = torch.autograd.grad(compiled(*inputs), inputs), [x[:, 0] for x in mapped]
    for grads in results:
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b)


# What is refused


@pytest.mark.parametrize(
    ("softcap", "error", "message"),
    [
        (-1.0, ValueError, "softcap is -1.0, must be finite and at least 0"),
        (math.inf, ValueError, "softcap is inf, must be finite"),
        (math.nan, ValueError, "softcap is nan, must be finite"),
        (1e39, ValueError, "softcap is 1e.39, must be at most 3.4"),
        ("50", TypeError, "softcap is '50', must be a number"),
        (None, TypeError, "softcap is None, must be a number"),
        (torch.tensor(50.0), TypeError, r"softcap is tensor\(50.\), must be a number"),
        (torch.ones(2).numpy(), TypeError, "softcap is array"),
    ],
)
def test_wrong_softcaps_are_named(device, softcap, error, message):
    q, k, v = random_qkv(device, torch.bfloat16, 1, 20, 20, 4)
    starts = torch.tensor([0, 20], dtype=torch.int32, device=device)
    with pytest.raises(error, match=message):
        flash_attn_func(q, k, v, softcap=softcap)
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, softcap=softcap)


def test_rows_are_for_calls_with_or_without(hopper):
    q, k, v = random_qkv(hopper, on(hopper))
    for row in tile_configs("forward"):
        if row["dtype"] != "bf16" or common_head_dim(row) < 64 or "variant" in row:
            continue
        wrong = {"softcap": 0.0 if row["softcap"] else 2.0, "tile_config": row["name"]}
        words = "takes calls with a softcap only" if row["softcap"] else "takes no softcap"
        with pytest.raises(ValueError, match=f"tile_config '{row['name']}' {words}"):
            flash_attn_func(q, k, v, **wrong)


def test_fp8_has_none_yet():
    q = torch.zeros(1, 20, 4, 64).to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="softcap is not there for float8_e4m3fn: pass q"):
        flash_attn_func(q, q, q, softcap=2.0)
