"""Sliding windows, explicit diagonals, and V with a head dim of its own: dense calls."""

import itertools
import math
import random

import pytest
import torch
from oracle import visible
from parity import (
    DTYPES,
    assert_gradients_right,
    assert_right,
    by_token,
    check,
    one_hot,
    random_qkv,
    run,
    skip_on_cuda,
)
from torch import func
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cute_kernels import flash_attn_func, reference
from cute_kernels.operators import flash_attn_backward, flash_attn_forward

OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
# As (left, right), around blocks of 64, 128 and 256 rows and at the ends
EDGES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000]
WINDOWS = [(n, -1) for n in EDGES] + [(-1, n) for n in EDGES] + [(n, 300 - n) for n in EDGES[:-1]]
WINDOWS += [(0, 0), (3, 0), (0, 3), (128, 128)]


@pytest.fixture
def windows(device):
    skip_on_cuda(device, "windows")
    return device


def random_mask(chance):
    """Arguments of flash_attn_func."""

    def limit():
        return chance.choice([-1, -1, 0, 1, chance.randint(2, 40), chance.randint(40, 400)])

    return {"causal": chance.random() < 0.4, "window_size": (limit(), limit())}


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
def test_random_calls(windows, seed):
    chance = random.Random(seed)
    lengths = [0, 1, 2, chance.randint(3, 100), *(chance.randint(100, 600) for _ in range(3))]
    dtype = chance.choice(list(DTYPES.values()))
    sizes = chance.randint(1, 2), chance.choice(lengths), chance.choice(lengths)
    qkv, grad_out, grad_lse = random_qkv_and_grads(chance, windows, dtype, *sizes)
    mask, scale = random_mask(chance), chance.choice([None, 0.05, 0.4])
    inputs = [x.requires_grad_() for x in qkv]
    out, lse = run(*inputs, **mask, softmax_scale=scale)
    grads = torch.autograd.grad(
        [out] if grad_lse is None else [out, lse],
        inputs,
        [grad_out] if grad_lse is None else [grad_out, grad_lse],
    )
    qkv = [x.detach() for x in qkv]
    scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
    assert_right(out.detach(), lse.detach(), *qkv, scale, **mask)
    assert_gradients_right(grads, grad_out, grad_lse, *qkv, scale, **mask)


@pytest.mark.parametrize("head_dims", [(192, 128), (64, 128), (128, 64), (8, 256), (256, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims_of_v(device, head_dims, causal):
    skip_on_cuda(device, "V's own head dim")
    q, k, _ = random_qkv(device, torch.bfloat16, 2, 150, 200, 4, 2, head_dims[0])
    _, v, _ = random_qkv(device, torch.bfloat16, 2, 150, 200, 4, 2, head_dims[1], seed=1)
    out, _ = check(q, k, v, causal)
    assert out.shape == (2, 150, 4, head_dims[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(257, 257), (130, 515), (300, 129)], ids=str)
def test_every_visible_key_has_its_weight(windows, lengths, causal):
    """Scores are all 0 and V is one-hot: a row that sees n keys has 1 / n of each."""
    seqlen_q, seqlen_k = lengths
    v = one_hot(seqlen_k, 0, 256, 256).to(windows, torch.float16)
    q = torch.zeros(v.shape[0], seqlen_q, 2, 8, device=windows, dtype=torch.float16)
    k = q.new_zeros(v.shape[0], seqlen_k, 1, 8)
    for window_size in WINDOWS:
        out = flash_attn_func(q, k, v, causal=causal, window_size=window_size)
        weights = by_token(out, 0, 256, seqlen_k)
        seen = visible(seqlen_q, seqlen_k, causal, window_size, device=windows)
        right = (seen / seen.sum(-1, keepdim=True).clamp(min=1))[:, None]
        assert ((weights - right).abs() <= 1e-3 * right).all(), window_size


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(257, 257), (130, 515), (300, 129)], ids=str)
def test_every_pair_has_its_gradient(windows, lengths, causal):
    """Scores are all 0 and dO is one-hot by query: dV holds P^T."""
    seqlen_q, seqlen_k = lengths
    grad_out = one_hot(seqlen_q, 0, 256, 256).to(windows)
    q = torch.zeros(grad_out.shape[0], seqlen_q, 1, 8, device=windows)
    k, v = q.new_zeros(q.shape[0], seqlen_k, 1, 8), q.new_zeros(q.shape[0], seqlen_k, 1, 256)
    v.requires_grad_()
    for window_size in WINDOWS[::2]:
        out = flash_attn_func(q, k, v, causal=causal, window_size=window_size)
        (grad_v,) = torch.autograd.grad(out, v, grad_out)
        seen = visible(seqlen_q, seqlen_k, causal, window_size, device=windows)
        right = (seen / seen.sum(-1, keepdim=True).clamp(min=1)).mT[:, None]
        weights = by_token(grad_v, 0, 256, seqlen_q)
        assert ((weights - right).abs() <= 1e-6 * right).all(), window_size


@pytest.mark.parametrize("window_size", [(20, 0), (20, 30), (-1, 5), (300, -1), (0, 0)], ids=str)
@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_what_a_window_hides_changes_no_bit(windows, window_size, wild):
    """NaN in tokens of K and V, and in queries and their gradients, beside 0 in their place."""
    q, k, v = random_qkv(windows, torch.bfloat16, 1, 400, 500, 4, 2, 64)
    grad_out = random_qkv(windows, torch.bfloat16, 1, 400, 1, 4, 2, 64, seed=1)[0]
    keys, queries = [0, 99, 255, 256, 380, 499], [0, 128, 399]
    results = []
    for value in (0.0, wild):
        inputs = [x.clone() for x in (q, k, v, grad_out)]
        for x, tokens in zip(inputs, (queries, keys, keys, queries), strict=True):
            x[:, tokens] = value
        *qkv, grad = inputs
        qkv = [x.requires_grad_() for x in qkv]
        out, lse = flash_attn_func(*qkv, window_size=window_size, return_lse=True)
        results.append((out, lse.mT, *torch.autograd.grad(out, qkv, grad)))
    seen = visible(400, 500, False, window_size, device=windows)
    reached = seen[:, keys].any(-1)
    reached[queries] = True  # queries that see a spoilt key or are spoilt
    reached_keys = seen[reached].any(0)
    clean = (~reached, ~reached, ~reached, ~reached_keys, ~reached_keys)
    for right, result, rows in zip(*results, clean, strict=True):
        assert torch.equal(result[0, rows], right[0, rows])
        assert right.isfinite().logical_or(right == -math.inf).all()
    if window_size == (20, 0):
        assert all(rows.any() for rows in clean)


def test_forms_of_a_window(windows):
    q, k, v = random_qkv(windows, torch.bfloat16, 1, 100, 150, 2)
    expected = flash_attn_func(q, k, v, window_size=(7, 5))
    for form in ([7, 5], torch.tensor([7, 5]), torch.tensor([7, 5], dtype=torch.int32)):
        assert torch.equal(flash_attn_func(q, k, v, window_size=form), expected)
    full = flash_attn_func(q, k, v)
    for none in (None, (None, None), [-1, -1], (2**40, -1), (-1, 2**31), (1000, 1000)):
        assert torch.equal(flash_attn_func(q, k, v, window_size=none), full)
    causal = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_func(q, k, v, window_size=(-1, 0)), causal)
    for right in (-1, 0, 9):
        assert torch.equal(flash_attn_func(q, k, v, causal=True, window_size=(-1, right)), causal)
    left = flash_attn_func(q, k, v, window_size=(7, 0))
    assert torch.equal(flash_attn_func(q, k, v, causal=True, window_size=(7, 9)), left)


BAD = {
    "a word": ("wide", TypeError),
    "one number": (7, TypeError),
    "one in a list": ([7], ValueError),
    "three": ((1, 2, 3), ValueError),
    "below -1": ((-2, 0), ValueError),
    "a fraction": ((1.5, 0), TypeError),
    "a tensor of floats": (torch.tensor([1.0, 2.0]), TypeError),
    "a scalar tensor": (torch.tensor(3), TypeError),
}


@pytest.mark.parametrize("bad", BAD)
def test_refused_windows(bad):
    window_size, error = BAD[bad]
    q, k, v = random_qkv("cpu", torch.bfloat16)
    with pytest.raises(error, match=r"window_size is .*, must be two ints \(left, right\)"):
        flash_attn_func(q, k, v, window_size=window_size)


BAD_HINTS = {
    "num_splits": [(-1, ValueError, "at least 0"), ("2", TypeError, "an int")],
    "pack_gqa": [(1, TypeError, "True, False or None"), ("yes", TypeError, "True, False or None")],
    "sm_margin": [(-1, ValueError, "at least 0"), (1.5, TypeError, "an int")],
}


@pytest.mark.parametrize("name", BAD_HINTS)
def test_refused_hints(name):
    q, k, v = random_qkv("cpu", torch.bfloat16)
    for value, error, words in BAD_HINTS[name]:
        with pytest.raises(error, match=rf"^{name} is {value!r}, must be .*{words}"):
            flash_attn_func(q, k, v, **{name: value})


def test_refused_by_the_operators():
    q, k, v = random_qkv("cpu", torch.bfloat16)
    out, lse = flash_attn_forward(q, k, v, 0.1, True, window_left=3)
    for name in ("window_left", "window_right"):
        with pytest.raises(ValueError, match=rf"{name} is -1, must be at least 0 or None"):
            flash_attn_forward(q, k, v, 0.1, True, **{name: -1})
        with pytest.raises(ValueError, match=rf"{name} is -1, must be at least 0 or None"):
            flash_attn_backward(out, None, q, k, v, out, lse, 0.1, True, False, **{name: -1})


CPU_ONLY = {
    "window_size": lambda q: flash_attn_func(q, q, q, window_size=(5, 5)),
    "sm_margin": lambda q: flash_attn_func(q, q, q, sm_margin=3),
    "diagonal": lambda q: flash_attn_forward(q, q, q, 0.1, True, diagonal=3),
    "v with a head_dim other than q's": lambda q: flash_attn_func(q, q, torch.cat([q, q], -1)),
}


@pytest.mark.parametrize("feature", CPU_ONLY)
def test_what_cuda_does_not_have_is_named(feature):
    message = f"^{feature} is not there yet on CUDA: CPU only so far$"
    with FakeTensorMode(), pytest.raises(NotImplementedError, match=message):
        CPU_ONLY[feature](torch.empty(1, 20, 2, 64, device="cuda", dtype=torch.half))


@pytest.mark.parametrize("feature", CPU_ONLY)
def test_what_a_gpu_does_not_have_is_named(hopper, feature):
    message = f"^{feature} is not there yet on CUDA: CPU only so far$"
    with pytest.raises(NotImplementedError, match=message):
        CPU_ONLY[feature](torch.zeros(1, 20, 2, 64, device=hopper, dtype=torch.bfloat16))


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
def test_diagonals(windows, limits, diagonal, causal):
    """0 is top-left aligned; others are a part of a longer sequence's queries."""
    q, k, v = random_qkv(windows, torch.bfloat16, 1, 150, 300, 2, 1, 40)
    grad_out = random_qkv(windows, torch.bfloat16, 1, 150, 300, 2, 1, 40, seed=1)[0]
    keywords = {"window_left": limits[0], "window_right": limits[1], "diagonal": diagonal}
    window_size = tuple(-1 if n is None else n for n in limits)
    mask = {"window_size": window_size, "diagonal": diagonal}
    out, lse = flash_attn_forward(q, k, v, 0.2, causal, **keywords)
    assert_right(out, lse, q, k, v, 0.2, causal, **mask)
    grads = flash_attn_backward(grad_out, None, q, k, v, out, lse, 0.2, causal, False, **keywords)
    assert_gradients_right(grads, grad_out, None, q, k, v, 0.2, causal, **mask)


def test_parts_of_a_sequence_are_its_rows(windows):
    """As context parallelism has them: each rank's queries against all keys."""
    q, k, v = random_qkv(windows, torch.float32, 1, 300, 300, 2, 1, 32)
    whole, lse = flash_attn_func(q, k, v, 0.2, window_size=(70, 0), return_lse=True)
    for start, stop in itertools.pairwise([0, 1, 100, 228, 300]):
        part, part_lse = flash_attn_forward(
            q[:, start:stop], k, v, 0.2, True, window_left=70, diagonal=start
        )
        torch.testing.assert_close(part, whole[:, start:stop])
        torch.testing.assert_close(part_lse, lse[:, :, start:stop])


def test_gradcheck():
    torch.manual_seed(0)
    shapes = [(1, 7, 4, 8), (1, 9, 2, 8), (1, 9, 2, 16)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def windowed(q, k, v):
        return flash_attn_func(q, k, v, 0.5, window_size=(3, 2), return_lse=True)

    assert torch.autograd.gradcheck(windowed, inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [{"window_left": 5}, {"window_right": 3}, {"diagonal": 4}, {"window_left": 2, "diagonal": -3}],
    ids=str,
)
def test_opcheck(keywords, requires_grad):
    q, k, _ = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, head_dim=16)
    _, _, v = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, head_dim=24)
    inputs = [x.requires_grad_(requires_grad) for x in (q, k, v)]
    result = torch.library.opcheck(
        flash_attn_forward, (*inputs, 0.3, False), keywords, test_utils=OPCHECK
    )
    assert set(result.values()) == {"SUCCESS"}
    if not requires_grad:
        out, lse = flash_attn_forward(*inputs, 0.3, False, **keywords)
        backward = (torch.randn_like(out), lse, *inputs, out, lse, 0.3, False, False)
        result = torch.library.opcheck(flash_attn_backward, backward, keywords, test_utils=OPCHECK)
        assert set(result.values()) == {"SUCCESS"}


def attention(q, k, v, window_size=(6, 2)):
    out, lse = flash_attn_func(q, k, v, window_size=window_size, return_lse=True)
    return out.square().sum() + lse.clamp(min=-9).sin().sum()


def gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = function(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def test_compiles_with_dynamic_shapes_and_windows():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for seqlen_q, seqlen_k, window_size in [(20, 30, (6, 2)), (25, 31, (7, 3)), (300, 40, (9, 4))]:
        inputs = random_qkv("cpu", torch.float32, 2, seqlen_q, seqlen_k, 4, 2, head_dim=16)
        actual = gradients(lambda *qkv, w=window_size: compiled(*qkv, w), *inputs)
        expected = gradients(lambda *qkv, w=window_size: attention(*qkv, w), *inputs)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # those of the first call


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, head_dim=16)
    expected = gradients(attention, *inputs)
    inputs = [x.requires_grad_() for x in inputs]
    checkpoint(attention, *inputs, use_reentrant=reentrant).backward()
    for x, right in zip(inputs, expected[1:], strict=True):
        torch.testing.assert_close(x.grad, right)


def test_transforms():
    inputs = random_qkv("cpu", torch.float64, 3, 20, 30, 4, 2, head_dim=16)
    _, *right = gradients(attention, *inputs)
    for a, b in zip(func.grad(attention, (0, 1, 2))(*inputs), right, strict=True):
        torch.testing.assert_close(a, b)
    samples = [x[:, None] for x in inputs]
    for a, b in zip(func.vmap(func.grad(attention, (0, 1, 2)))(*samples), right, strict=True):
        torch.testing.assert_close(a[:, 0], b)
    mapped = func.vmap(lambda *qkv: flash_attn_forward(*qkv, 0.1, True, window_left=3))(*samples)
    for a, b in zip(mapped, flash_attn_forward(*inputs, 0.1, True, window_left=3), strict=True):
        torch.testing.assert_close(a[:, 0], b)
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        func.jvp(attention, tuple(inputs), tuple(inputs))
    with pytest.raises(NotImplementedError, match="second derivative"):
        func.grad(lambda q: func.grad(attention)(q, *inputs[1:]).sum())(inputs[0])


def test_fp8_has_no_windows():
    q = torch.randn(1, 20, 2, 64).to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="window_size is not there yet for float8_e4m3fn"):
        flash_attn_func(q, q, q, window_size=(3, 3))
