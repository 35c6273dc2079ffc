"""Attention to parts of the keys: what one part gives, what parts make together, and gradients that
are added up part by part."""

import dataclasses
import math
import random

import pytest
import torch
from oracle import Attention, assert_rows
from packed import assert_packed_right, random_grads, random_packed
from parity import assert_right, random_qkv, skip_unless_answered
from torch._subclasses import FakeTensorMode

from cute_kernels.operators import flash_attn_backward, flash_attn_varlen_backward
from cute_kernels.parts import (
    Mask,
    Packed,
    attend_part,
    merge_part_,
    merge_parts,
    part_gradients_,
)

INF = math.inf


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(x, value=math.nan):
    """The same in memory that has other values between its rows and heads."""
    around = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 8), value)
    around[..., :-1, :-8] = x
    return around[..., :-1, :-8]


def window_of(mask):
    """`causal` and `window_size` of the oracle, where a limit of -1 is none."""
    return tuple(-1 if limit is None else limit for limit in mask[:2])


# Merging


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


def assert_merged(out, lse, first, first_lse, second, second_lse):
    right_lse = torch.logaddexp(first_lse.double(), second_lse.double())
    unseen = right_lse == -INF
    right = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    reach = right.clone()
    for x, of_x in ((first, first_lse), (second, second_lse)):
        weight = (of_x.double() - right_lse.masked_fill(unseen, 0.0)).exp().mT[..., None]
        term = (weight * x.double()).masked_fill(weight == 0, 0.0)
        right, reach = right + term, reach + term.abs()
    largest = torch.maximum(first_lse, second_lse).masked_fill(unseen, 0.0).abs()
    noise = torch.finfo(lse.dtype).eps * (16 + largest.double().mT)
    allowed = reach.norm(dim=-1) * noise + right.norm(dim=-1) * torch.finfo(out.dtype).eps
    assert_rows("output", out, right, allowed)
    assert torch.equal(lse == -INF, unseen)
    assert not out[unseen.mT].any()
    lse, right_lse = lse.masked_fill(unseen, 0.0), right_lse.masked_fill(unseen, 0.0)
    torch.testing.assert_close(lse, right_lse.to(lse.dtype), rtol=1e-6, atol=1e-5)


DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, None),
    (torch.float16, torch.float16, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16),
]
SHAPES = [(2, 7, 4, 16), (1, 300, 3, 128), (37, 5, 72), (9, 2, 256)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge(device, shape, dtypes):
    first, first_lse, second, second_lse = random_results(device, shape, dtypes[:2])
    results = (first, first_lse, second, second_lse)
    out, lse = merge_parts(*results, dtypes[2])
    assert out.dtype == (dtypes[2] or dtypes[0]) and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    assert_merged(out, lse, *results)
    # Of any strides
    lse_apart = torch.stack([first_lse, first_lse], -1)[..., 0]
    again = merge_parts(padded(first), lse_apart, padded(second), second_lse.mT.contiguous().mT)
    if dtypes[2] in (None, dtypes[0]):
        assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_in_place(device, shape, dtypes):
    """Rows that the part has nothing of stay as they are, what lies between rows too."""
    first, first_lse, second, second_lse = random_results(device, shape, dtypes[:2], seed=1)
    alone = second_lse == -INF
    right, right_lse = merge_parts(first, first_lse, second, second_lse)
    right = torch.where(alone.mT[..., None], first, right)
    out, lse = padded(first), first_lse.clone()
    versions = out._version, lse._version
    assert merge_part_(out, lse, second, second_lse) is None
    assert torch.equal(out.nan_to_num(9.0), right.nan_to_num(9.0))
    assert torch.equal(lse, torch.where(alone, first_lse, right_lse))
    assert out._base[..., -1, :].isnan().all() and out._base[..., -8:].isnan().all()
    assert out._version > versions[0] and lse._version > versions[1]


def test_merge_of_odd_strides(device):
    """Which no vector can read."""
    results = random_results(device, (2, 7, 4, 16), (torch.bfloat16, torch.bfloat16))
    right = merge_parts(*results)
    odd = torch.empty(2 * 7 * 4 * 17 + 1, dtype=torch.bfloat16, device=device)[1:]
    odd = odd.view(2, 7, 4, 17)[..., :16]
    odd.copy_(results[0])
    again = merge_parts(odd, *results[1:])
    assert all(torch.equal(a, b) for a, b in zip(right, again, strict=True))


def test_merge_of_nothing(device):
    for shape in [(2, 0, 4, 16), (0, 5, 4, 16), (0, 4, 16), (3, 0, 16), (2, 3, 4, 0)]:
        out = torch.empty(shape, device=device)
        *batch, seqlen, heads, _ = shape
        lse = torch.zeros(*batch, heads, seqlen, device=device)
        merged = merge_parts(out, lse, out, lse, torch.bfloat16)
        assert merged[0].shape == shape and merged[1].shape == lse.shape
        merge_part_(out, lse, out, lse)


def test_merge_of_values_that_are_not_finite(device):
    nan, one = torch.tensor([math.nan], device=device), torch.ones(1, device=device)
    out = torch.ones(1, 1, 8, device=device)
    for first, second in [(nan, one), (one, nan), (INF * one, one)]:
        merged, lse = merge_parts(out, first[None], out, second[None])
        assert merged.isnan().all() and not lse.isfinite().any()
    merged, lse = merge_parts(INF * out, one[None], out, one[None])
    assert (merged == INF).all() and lse.isfinite().all()


# Parts of attention


def cuts_of(chance, length, parts):
    """Where parts begin and end; some may have nothing."""
    inner = sorted(chance.randint(0, length) for _ in range(parts - 1))
    return list(zip([0, *inner], [*inner, length], strict=True))


CASES = {
    "full": (Mask(), (60, 90), (4, 2)),
    "causal": (Mask(right=0), (90, 90), (4, 4)),
    "more keys": (Mask(right=0), (33, 150), (4, 1)),
    "more queries": (Mask(right=0), (150, 70), (2, 2)),
    "top left": (Mask(right=0, diagonal=0), (130, 200), (3, 3)),
    "before": (Mask(right=0, diagonal=-1), (128, 128), (4, 2)),
    "window": (Mask(40, 0), (200, 200), (4, 2)),
    "both sides": (Mask(20, 30, 5), (140, 170), (2, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_dense_call(device, case):
    """Output, LSE and gradients of all keys, from parts of them."""
    mask, (seqlen_q, seqlen_k), heads = CASES[case]
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype)
    q, k, v = random_qkv(device, dtype, 2, seqlen_q, seqlen_k, *heads)
    diagonal = seqlen_k - seqlen_q if mask.diagonal is None else mask.diagonal
    chance = random.Random(case)
    cuts = cuts_of(chance, seqlen_k, 4)
    out = torch.full(q.shape, math.nan, device=device)
    lse = torch.full((2, heads[0], seqlen_q), -INF, device=device)

    def part(begin, end):
        """The keys and values, and what is seen of them."""
        return k[:, begin:end], v[:, begin:end], mask._replace(diagonal=diagonal - begin)

    for cut in cuts[:-1]:
        keys, values, own = part(*cut)
        merge_part_(out, lse, *attend_part(q, keys, values, 0.1, own))
    keys, values, own = part(*cuts[-1])
    out, lse = merge_parts(out, lse, *attend_part(q, keys, values, 0.1, own), dtype)
    options = {"window_size": window_of(mask), "diagonal": diagonal}
    assert_right(out, lse, q, k, v, 0.1, False, **options)

    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grad_q = torch.full(q.shape, math.nan, device=device)
    grad_k, grad_v = (torch.full(x.shape, math.nan, device=device) for x in (k, v))
    for i, (begin, end) in enumerate(cuts):
        keys, values, own = part(begin, end)
        grads = (grad_q, grad_k[:, begin:end], grad_v[:, begin:end])
        results = (grad_out, q, keys, values, out, lse)
        more = {"grad_lse": grad_lse, "add_to_q": i > 0}
        assert part_gradients_(*grads, *results, 0.1, own, **more) is None
    exact = Attention(q, k, v, 0.1, False, **options).gradients(grad_out, grad_lse)
    grads = dict(zip("qkv", (grad_q, grad_k, grad_v), strict=True))
    for (name, grad), right in zip(grads.items(), exact, strict=True):
        assert_rows(f"gradient of {name}", grad, *right)


def lengths_of(call, diagonal=None):
    own = call.lengths()
    if diagonal is not None:
        diagonal = call._int32(diagonal)
    return Packed(*own.values(), diagonal)


@pytest.mark.parametrize("mask", [Mask(), Mask(right=0), Mask(30, 4)], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
def test_parts_of_packed_sequences(device, mask, heads):
    """Each sequence's keys in two parts, of which either may be empty."""
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype)
    chance = random.Random(str((mask, heads)))
    slots_q, slots_k = [70, 1, 0, 130, 40], [90, 50, 30, 130, 0]
    call = random_packed(
        chance, device, dtype, slots_q, slots_k, (64, 64), heads, used=True, tail=7
    )
    halves = [], []  # of each sequence's rows of k
    for _, rows in call.sequences():
        middle = chance.randint(rows.start, rows.stop)
        halves[0].append(slice(rows.start, middle))
        halves[1].append(slice(middle, rows.stop))
    whole = [r.stop - r.start for _, r in call.sequences()]
    used_q = [r.stop - r.start for r, _ in call.sequences()]
    out, lse, parts = None, None, []
    for half in halves:
        rows = torch.cat([torch.arange(r.start, r.stop) for r in half]).to(device)
        lengths = [r.stop - r.start for r in half]
        begins = [r.start - s.start for r, (_, s) in zip(half, call.sequences(), strict=True)]
        diagonal = [n - m - b for n, m, b in zip(whole, used_q, begins, strict=True)]
        own = dataclasses.replace(
            call, k=call.k[rows], v=call.v[rows], slots_k=lengths, used_k=None
        )
        packed = lengths_of(own, diagonal)
        parts.append((rows, own, packed))
        result = attend_part(*own.qkv, 0.1, mask, packed)
        out, lse = result if out is None else merge_parts(out, lse, *result)
    grad_out, grad_lse = random_grads(call)
    grads = [torch.zeros(x.shape, device=device) for x in call.qkv]
    for rows, own, packed in parts:
        of_part = [torch.full(x.shape, math.nan, device=device) for x in own.qkv]
        of_part[0] = grads[0]
        results = (grad_out, *own.qkv, out, lse)
        part_gradients_(*of_part, *results, 0.1, mask, packed, grad_lse=grad_lse, add_to_q=True)
        grads[1][rows], grads[2][rows] = of_part[1:]
    results = (out, lse, *(x.to(dtype) for x in grads))
    options = {"softmax_scale": 0.1, "window_size": window_of(mask)}
    assert_packed_right(results, call, (grad_out, grad_lse), **options)


# Gradients into given tensors


def given(inputs, seed=3):
    """Tensors of N(0, 1) as wide as sums, in memory that has other values between."""
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    how = {"generator": generator, "device": inputs[0].device, "dtype": wide_of(inputs[0].dtype)}
    return [padded(torch.randn(x.shape, **how)) for x in inputs]


def assert_into(write, plain, inputs, dtype):
    """Of gradients that are rounded to `plain`: written, and added to what was there."""
    targets = given(inputs)
    write(*targets)
    for target, right in zip(targets, plain, strict=True):
        assert torch.equal(target.to(dtype), right)
        assert target._base[..., -1, :].isnan().all() and target._base[..., -8:].isnan().all()
    for options in ({"add_to_q": True}, {"add_to_kv": True}):
        sums, before = given(inputs, seed=4), given(inputs, seed=4)
        write(*sums, **options)
        adds = ["add_to_q" in options, *2 * ["add_to_kv" in options]]
        for total, first, target, add in zip(sums, before, targets, adds, strict=True):
            assert torch.equal(total, first + target if add else target)
            assert total._base[..., -1, :].isnan().all() and total._base[..., -8:].isnan().all()


MASKS = [Mask(), Mask(right=0), Mask(right=0, diagonal=-7), Mask(50, 20)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 40, 96, 192])
def test_gradients_into_dense(device, mask, head_dim):
    """They are those that are returned, before they are rounded."""
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype, head_dim)
    q, k, v = random_qkv(device, dtype, 2, 150, 210, 4, 2, head_dim)
    out, lse = attend_part(q, k, v, 0.1, mask)
    results = (torch.randn_like(out), None, q, k, v, out, lse)
    options = dict(zip(("window_left", "window_right", "diagonal"), mask, strict=True))
    *plain, _ = flash_attn_backward(*results, 0.1, False, True, **options)

    def write(*targets, **options):
        part_gradients_(
            *targets, results[0], q, k, v, out, lse, 0.1, mask, deterministic=True, **options
        )

    assert_into(write, plain, (q, k, v), dtype)


@pytest.mark.parametrize("mask", [Mask(), Mask(right=0), Mask(50, 20)], ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 64), (192, 128), (256, 256)], ids=str)
def test_gradients_into_packed(device, mask, head_dims):
    """Rows that no sequence uses get 0, or stay as they are."""
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype, *head_dims)
    chance = random.Random(5)
    slots = [130, 1, 0, 200, 64], [100, 70, 9, 0, 64]
    call = random_packed(chance, device, dtype, *slots, head_dims, (4, 2), used=True, tail=9)
    packed = lengths_of(call)
    out, lse = attend_part(*call.qkv, 0.1, mask, packed)
    grad_out, grad_lse = random_grads(call)
    results = (grad_out, grad_lse, *call.qkv, out, lse, *packed.lengths, 0.1, False)
    window = {"window_left": mask.left, "window_right": mask.right}
    *plain, _ = flash_attn_varlen_backward(*results, deterministic=True, **window)

    def write(*targets, **options):
        part_gradients_(
            *targets, grad_out, *call.qkv, out, lse, 0.1, mask, packed,
            grad_lse=grad_lse, deterministic=True, **options,
        )  # fmt: skip

    assert_into(write, plain, call.qkv, dtype)


@pytest.mark.parametrize("deterministic", [False, True])
def test_hidden_values_are_added_once(device, deterministic):
    """What a mask hides may be NaN: a kernel that notices does its work again."""
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype)
    q, k, v = random_qkv(device, dtype, 1, 200, 200, 2, 2)
    out, lse = attend_part(q, k, v, 0.1, Mask(right=0))
    grad_out = torch.randn_like(out)
    last = slice(190, None)  # seen by the last rows alone
    k[:, last], v[:, last] = math.nan, math.nan
    out, lse = attend_part(q, k, v, 0.1, Mask(right=0))
    grads = [torch.ones(x.shape, device=device) for x in (q, k, v)]
    part_gradients_(
        *grads, grad_out, q, k, v, out, lse, 0.1, Mask(right=0),
        add_to_q=True, add_to_kv=True, deterministic=deterministic,
    )  # fmt: skip
    exact = Attention(q, k, v, 0.1, True).gradients(grad_out)
    for name, grad, (right, allowed) in zip("qkv", grads, exact, strict=True):
        allowed = allowed + 1e-6 * (1 + right.norm(dim=-1))
        assert_rows(f"gradient of {name}", grad - 1, right, allowed)


def test_gradients_without_keys_or_queries(device):
    skip_unless_answered(device, torch.bfloat16)
    for seqlen_q, seqlen_k in [(0, 5), (5, 0), (0, 0)]:
        q, k, v = random_qkv(device, torch.bfloat16, 2, seqlen_q, seqlen_k, 2, 2)
        out, lse = attend_part(q, k, v, 0.1)
        for add in (False, True):
            grads = [torch.ones(x.shape, device=device) for x in (q, k, v)]
            adds = {"add_to_q": add, "add_to_kv": add}
            part_gradients_(*grads, out, q, k, v, out, lse, 0.1, **adds)
            assert all((x == add).all() for x in grads)


def test_sinks_belong_into_one_part(device):
    """Their gradient is that of all parts, and depends on none."""
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype)
    q, k, v = random_qkv(device, dtype, 2, 70, 120, 4, 2)
    sinks = torch.randn(4, device=device)
    first = attend_part(q, k[:, :50], v[:, :50], 0.1, sinks=sinks)
    out, lse = merge_parts(*first, *attend_part(q, k[:, 50:], v[:, 50:], 0.1))
    assert_right(out, lse, q, k, v, 0.1, False, sinks=sinks)
    grad_out = torch.randn_like(out)
    right, allowed = Attention(q, k, v, 0.1, False, sinks=sinks).sinks_gradient(grad_out)
    for part in (slice(0, 50), slice(50, None)):
        keys, values = k[:, part], v[:, part]
        grads = [torch.empty(x.shape, device=device) for x in (q, keys, values)]
        result = part_gradients_(*grads, grad_out, q, keys, values, out, lse, 0.1, sinks=sinks)
        assert_rows("gradient of sinks", result[:, None], right[:, None], allowed)


# PyTorch's machinery


def dense_call(dtype=torch.float32):
    q, k, v = random_qkv("cpu", dtype, 1, 9, 12, 4, 2, 16)
    out, lse = attend_part(q, k, v, 0.3, Mask(right=0))
    grads = [torch.ones(x.shape, dtype=wide_of(dtype)) for x in (q, k, v)]
    return grads, (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)


def packed_call():
    call = random_packed(random.Random(1), "cpu", torch.float32, [5, 3], [4, 9], (16, 8), (4, 2))
    packed = lengths_of(call)
    out, lse = attend_part(*call.qkv, 0.3, Mask(right=0), packed)
    grads = [torch.ones(x.shape) for x in call.qkv]
    return grads, (*random_grads(call), *call.qkv, out, lse, *packed.lengths)


def opcheck(operator, *inputs, **keywords):
    done = torch.library.opcheck(operator, inputs, keywords)
    assert set(done.values()) == {"SUCCESS"}


def test_operators():
    operators = torch.ops.cute_kernels
    grads, results = dense_call()
    options = {"window_left": 3, "sm_margin": 4}
    into = operators.flash_attn_backward_into.default
    opcheck(into, *grads, False, True, *results, 0.3, True, False, **options)
    opcheck(into, *grads, True, False, *results, 0.3, False, False, None, torch.zeros(4))
    grads, results = packed_call()
    into = operators.flash_attn_varlen_backward_into.default
    opcheck(into, *grads, True, True, *results, 0.3, True, max_seqlen_q=5, sm_margin=4)
    parts = [x.nan_to_num(0.0) if x.dim() == 4 else x for x in random_results(
        "cpu", (2, 7, 4, 16), (torch.float32, torch.bfloat16)
    )]  # fmt: skip
    opcheck(operators.flash_attn_merge.default, *parts, out_dtype=torch.float16)
    opcheck(operators.flash_attn_merge_.default, *parts)


def test_shape_inference():
    parts = random_results("cpu", (7, 4, 16), (torch.float32, torch.bfloat16))
    real = merge_parts(*parts, torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = merge_parts(*map(mode.from_tensor, parts), torch.bfloat16)
        merge_part_(*map(mode.from_tensor, parts))
        how = {"device": "cuda", "dtype": torch.bfloat16}
        q, (k, v) = torch.empty(1, 9, 4, 16, **how), torch.empty(2, 1, 12, 2, 16, **how).unbind()
        out, lse = attend_part(q, k, v, 0.3, Mask(right=0, diagonal=2))
        grads = [torch.empty(x.shape, device="cuda") for x in (q, k, v)]
        sinks = torch.zeros(4, device="cuda")
        of_sinks = part_gradients_(*grads, out, q, k, v, out, lse, 0.3, sinks=sinks)
        assert of_sinks.shape == (4,) and of_sinks.device == q.device
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_compiled():
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q, k, v, out, lse):
        out, lse = out.clone(), lse.clone()
        merge_part_(out, lse, *attend_part(q, k, v, 0.3, Mask(right=0, diagonal=1)))
        grads = [torch.zeros(x.shape) for x in (q, k, v)]
        part_gradients_(*grads, q, q, k, v, out, lse, 0.3, add_to_q=True)
        return out, lse, *grads

    q, k, v = random_qkv("cpu", torch.float32, 1, 9, 12, 4, 2, 16)
    inputs = (q, k, v, *attend_part(q, k, v, 0.3))
    with torch.compiler.set_stance("force_eager"):
        eager = step(*inputs)
    for a, b in zip(step(*inputs), eager, strict=True):
        assert torch.equal(a, b)


# Refusals

BAD_MERGES = {
    "rank": ({0: lambda x: x[0, 0]}, ValueError, r"out has shape \(4, 16\), must be \(batch, se"),
    "head_dim": (
        {0: lambda x: x[..., :12], 2: lambda x: x[..., :12]},
        ValueError,
        "out has head_dim 12, must have a multiple of 8",
    ),
    "shape": ({2: lambda x: x[:1]}, ValueError, r"part_out has shape \(1, 7, 4, 16\), must be "),
    "dtype": ({2: lambda x: x.int()}, TypeError, "part_out has dtype torch.int32, must be float32"),
    "strided": (
        {0: lambda x: x.repeat_interleave(2, -1)[..., ::2]},
        ValueError,
        "out has strides .*, its last dimension",
    ),
    "lse shape": (
        {3: lambda x: x.mT},
        ValueError,
        r"part_lse has shape \(2, 7, 4\), must be \(batch, heads, seqlen\) = \(2, 4, 7\)",
    ),
    "lse dtype": ({1: lambda x: x.half()}, TypeError, "lse has dtype torch.float16, must be torch"),
    "no tensor": ({1: lambda _: None}, TypeError, "lse is a NoneType, must be a torch.Tensor"),
}


@pytest.mark.parametrize("bad", BAD_MERGES)
def test_refused_merges(device, bad):
    changes, error, message = BAD_MERGES[bad]
    parts = random_results(device, (2, 7, 4, 16), (torch.float32, torch.bfloat16))
    parts = [changes.get(i, lambda x: x)(x) for i, x in enumerate(parts)]
    for call in (merge_parts, merge_part_):
        with pytest.raises(error, match=f"^{message}"):
            call(*parts)


def test_refused_dtype_of_a_merge(device):
    parts = random_results(device, (2, 7, 4, 16), (torch.float32, torch.bfloat16))
    with pytest.raises(TypeError, match=r"^out_dtype is torch\.int32, must be float32, float16"):
        merge_parts(*parts, torch.int32)


BAD_GRADIENTS = {
    "dtype": (0, lambda x: x.bfloat16(), TypeError, "grad_q has dtype torch.bfloat16, must be tor"),
    "shape": (1, lambda x: x[:, :-1], ValueError, r"grad_k has shape .*, must be \(1, 12, 2, 16\)"),
    "strided": (
        2,
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        ValueError,
        "grad_v has strides .*, its last dimension",
    ),
    "no tensor": (1, lambda _: None, TypeError, "grad_k is a NoneType, must be a torch.Tensor"),
}


@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_refused_gradients(device, bad):
    at, change, error, message = BAD_GRADIENTS[bad]
    grads, (grad_out, _, q, k, v, out, lse) = dense_call(torch.bfloat16)
    grads, results = (
        [x.to(device) for x in tensors] for tensors in (grads, (grad_out, q, k, v, out, lse))
    )
    grads[at] = change(grads[at])
    with pytest.raises(error, match=f"^{message}"):
        part_gradients_(*grads, *results, 0.3)


def test_refused_vectors():
    """On CUDA alone: the CPU takes any strides."""
    with FakeTensorMode():
        q = torch.empty(1, 20, 2, 64, device="cuda", dtype=torch.half)
        lse = torch.empty(1, 2, 20, device="cuda")
        grad = torch.empty(1, 20, 2, 65, device="cuda").narrow(-1, 0, 64)
        with pytest.raises(ValueError, match=r"^grad_q has strides \(2600, 130, 65, 1\) and offs"):
            part_gradients_(grad, grad, grad, q, q, q, q, q, lse, 0.3)


def test_a_diagonal_belongs_to_each_sequence():
    call = random_packed(random.Random(1), "cpu", torch.float32, [5], [4], (16, 16), (2, 2))
    with pytest.raises(ValueError, match=r"^mask has the diagonal 0, must have None with packed"):
        attend_part(*call.qkv, 0.3, Mask(0, 0, 0), lengths_of(call))


def test_masks_and_lengths_have_types_of_their_own():
    q = torch.zeros(1, 10, 2, 64)
    with pytest.raises(TypeError, match=r"^mask is \(3, 0\), must be a cute_kernels\.parts\.Mask$"):
        attend_part(q, q, q, 0.1, (3, 0))
    with pytest.raises(TypeError, match=r"^packed is 'all', must be a cute_kernels\.parts\.Packed"):
        attend_part(q, q, q, 0.1, packed="all")


@pytest.mark.parametrize("margin", [(-1, ValueError, "at least 0"), (1.5, TypeError, "an int")])
def test_refused_margins(device, margin):
    value, error, message = margin
    q, k, v = random_qkv(device, torch.bfloat16, 1, 9, 12, 2, 2)
    with pytest.raises(error, match=f"^sm_margin is {value}, must be {message}"):
        attend_part(q, k, v, 0.3, sm_margin=value)
