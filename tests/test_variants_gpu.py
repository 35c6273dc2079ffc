"""Variants on the GPU: kernels with the hooks of variant_cases.py, row by row against fp64."""

import math
import random

import pytest
import torch
from oracle import Attention, Changes
from parity import poison, random_qkv
from variant_cases import (
    CASES,
    assert_captured_gradients,
    assert_gradients,
    assert_results,
)

from cute_kernels import Variant, flash_attn_func, flash_attn_varlen_func, variants
from cute_kernels.compat import flash_attn as fa2
from cute_kernels.variants.checks import with_gradient
from cute_kernels.variants.kernels import load, rows_of
from cute_kernels.variants.philox import uniform

HEAD_DIMS = [64, 128]
LENGTHS = [1, 3, 63, 64, 65, 130, 200, 333]


@pytest.fixture(scope="session")
def kernels():
    """All kernels of the cases, compiled at once."""
    if not torch.cuda.is_available():
        pytest.skip("needs a Hopper GPU: PyTorch sees no GPU here")
    rows = {}
    for case in CASES.values():
        for seed in range(6):  # both dtypes of a bias
            chance = random.Random(seed)
            bound = case(chance, "cuda", 1, 1, 1, 1).bound
            names = with_gradient(bound)
            for head_dim in HEAD_DIMS:
                for row in rows_of(bound.variant.hooks.key, torch.bfloat16, head_dim, True, names):
                    rows[row["name"]] = row
    load(list(rows.values()))


def random_call(chance, heads, device):
    call = {"window_size": chance.choice([(-1, -1), (-1, -1), (70, -1), (5, 90), (-1, 0)])}
    call["sinks"] = torch.randn(heads, device=device) if chance.random() < 0.3 else None
    return call, chance.random() < 0.4


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("name", CASES)
def test_random_calls(hopper, kernels, name, seed):
    chance = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    head_dim = chance.choice(HEAD_DIMS)
    batch, lengths = chance.choice([1, 2]), [chance.choice(LENGTHS) for _ in "qk"]
    heads = chance.choice([(2, 2), (4, 2), (4, 1)])
    q, k, v = random_qkv(hopper, torch.bfloat16, batch, *lengths, *heads, head_dim, seed)
    q = q * chance.choice([1, 1, 4])
    case = CASES[name](chance, hopper, batch, heads[0], *lengths)
    call, causal = random_call(chance, heads[0], hopper)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    poison(q, v)
    deterministic = chance.random() < 0.5
    out, lse = flash_attn_func(
        *inputs,
        causal=causal,
        deterministic=deterministic,
        return_lse=True,
        variant=case.bound,
        **call,
    )
    exact = Attention(q, k, v, head_dim**-0.5, causal, changes=case.changes, **call)
    assert_results(out.detach(), lse.detach(), exact)
    grads = torch.randn_like(out), torch.randn_like(lse)
    captured = list(case.with_gradients.values())
    results = torch.autograd.grad((out, lse), (*inputs, *captured), grads)
    assert_gradients(results[:3], exact, *grads)
    assert_captured_gradients(results[3:], case, exact, *grads)


def packed_alibi(device, i, queries, keys, slopes):
    def score(scores, b, h, row, key):
        return scores + slopes.detach().double()[h] * (key - row - keys + queries)

    return Changes(score)


def packed_document(device, i, queries, keys, ids):
    return Changes(mask=lambda b, h, row, key: ids[i, row] == ids[i, key])


def packed_dropout(device, i, queries, keys, state):
    number = torch.tensor(i, device=device)

    def weight(b, h, row, key):
        return (uniform(state[0], state[1], b + number, h, row, key) >= 0.25) / 0.75

    return Changes(weight=weight)


@pytest.mark.parametrize("changes_of", [packed_alibi, packed_document, packed_dropout])
def test_packed_sequences(hopper, kernels, changes_of):
    """Each is a dense call, but for its number."""
    torch.manual_seed(1)
    lengths_q, lengths_k = [70, 1, 0, 200, 64], [70, 33, 5, 128, 1]
    starts_q, starts_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0)], device=hopper).int()
        for n in (lengths_q, lengths_k)
    )
    q, k, v = (
        torch.randn(n, h, 64, device=hopper).bfloat16().requires_grad_()
        for n, h in ((sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2))
    )
    if changes_of is packed_alibi:
        captured = torch.rand(4, device=hopper, requires_grad=True)
        bound = variants.alibi(captured)
    elif changes_of is packed_document:
        captured = torch.randint(0, 3, (5, 200), device=hopper).int()
        bound = variants.document(captured)
    else:
        captured = torch.tensor([7, 8], device=hopper)
        bound = variants.dropout(0.25, captured)
    options = {"causal": True, "return_lse": True, "variant": bound}
    out, lse = flash_attn_varlen_func(q, k, v, starts_q, starts_k, 200, 128, **options)
    grads = torch.randn_like(out), torch.randn_like(lse)
    inputs = [q, k, v, captured] if captured.requires_grad else [q, k, v]
    results = torch.autograd.grad((out, lse), inputs, grads)
    of_captured = 0.0
    for i in range(5):
        rows, keys = (slice(int(s[i]), int(s[i + 1])) for s in (starts_q, starts_k))
        if rows.stop == rows.start:
            continue
        part = [x.detach()[None, n] for x, n in ((q, rows), (k, keys), (v, keys))]
        changes = changes_of(hopper, i, lengths_q[i], lengths_k[i], captured)
        exact = Attention(*part, 1 / 8, True, changes=changes)
        assert_results(out.detach()[None, rows], lse.detach()[None, :, rows], exact)
        of_part = [x[None, n] for x, n in zip(results[:3], (rows, keys, keys), strict=True)]
        grad_out, grad_lse = grads[0][None, rows], grads[1][None, :, rows]
        assert_gradients(of_part, exact, grad_out, grad_lse)
        if captured.requires_grad:
            again = captured.detach().requires_grad_()
            options["variant"] = variants.alibi(again)
            one = flash_attn_func(*part, **options)
            of_captured += torch.autograd.grad(one, again, (grad_out, grad_lse))[0]
    if captured.requires_grad:
        assert torch.allclose(results[3], of_captured, rtol=1e-4, atol=1e-3)


def test_the_library_and_a_variant_of_the_same(hopper, kernels):
    """Softcap within a rounding step of the library's own, LSE to 1e-5; so a window."""
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, 300, 400, 4, 2, 64)
    pairs = [({"softcap": 30.0}, variants.softcap(30.0))]
    pairs += [({"window_size": (39, 0)}, variants.dilated(40, 1))]
    for own, variant in pairs:
        out, lse = flash_attn_func(q, k, v, return_lse=True, **own)
        out_2, lse_2 = flash_attn_func(q, k, v, return_lse=True, variant=variant)
        assert (lse - lse_2).abs().nan_to_num(0.0).max() < 2e-5
        assert (out.float() - out_2.float()).abs().max() <= 2.0**-7 * out.float().abs().max()


def test_nan_that_a_hook_hides(hopper, kernels):
    """In no row that does not see it, and in all that do."""
    torch.manual_seed(0)
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 300, 300, 2, 2, 64)
    ids = (torch.arange(300, device=hopper)[None] // 100).int()
    k[:, 120], v[:, 110], v[:, 250] = math.nan, math.inf, math.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_func(*inputs, variant=variants.document(ids), return_lse=True)
    exact = Attention(
        *(x.detach() for x in inputs),
        1 / 8,
        False,
        changes=Changes(mask=lambda b, h, i, j: ids[b, i] == ids[b, j]),
    )
    assert out[:, :100].isfinite().all()
    assert not out[:, 100:200].isfinite().any()
    assert not out[:, 200:].isfinite().any()
    grads = torch.randn_like(out), torch.randn_like(lse)
    grads[0][:, 150] = math.nan
    results = torch.autograd.grad((out, lse), inputs, grads)
    assert_gradients(results, exact, *grads)
    assert all(grad[:, :100].isfinite().all() for grad in results)


def test_strides_of_one(hopper, kernels):
    """Those of a bias for a batch entry of 2^31 scores."""
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 130, 65, 2, 2, 64, 0)
    bias = torch.randn(1, 2, 130, 65, device=hopper, requires_grad=True)
    wide = bias.as_strided(bias.shape, (2**31, *bias.stride()[1:]))
    outs = [flash_attn_func(q, k, v, variant=variants.bias(x)) for x in (bias, wide)]
    assert torch.equal(*outs)
    grad = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, bias, grad, retain_graph=True)[0] for out in outs]
    assert torch.equal(*grads)


def test_gradients_are_the_same_bits_again(hopper, kernels):
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, 500, 500, 4, 2, 64)
    slopes = torch.rand(4, device=hopper, requires_grad=True)
    inputs = [x.requires_grad_() for x in (q, k, v)] + [slopes]
    runs = []
    for _ in range(5):
        out = flash_attn_func(
            *inputs[:3], causal=True, deterministic=True, variant=variants.alibi(slopes)
        )
        runs.append(torch.autograd.grad(out.square().sum(), inputs))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_in_a_graph(hopper, kernels):
    """Dropout's numbers change with what the state tensor holds when the graph runs."""
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 128, 128, 2, 2, 64)
    state = torch.tensor([1, 0], device=hopper)

    def run():
        return flash_attn_func(q, k, v, variant=variants.dropout(0.5, state))

    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    assert torch.equal(out, first)
    state[1] = 1
    graph.replay()
    assert not torch.equal(out, first)
    assert torch.equal(out, run())


def test_compiled(hopper, kernels):
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, 200, 200, 4, 2, 64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    slopes = torch.rand(4, device=hopper, requires_grad=True)

    def loss(q, k, v, slopes):
        return flash_attn_func(q, k, v, causal=True, variant=variants.alibi(slopes)).square().sum()

    expected = torch.autograd.grad(loss(*inputs, slopes), [*inputs, slopes])
    compiled = torch.compile(loss)
    results = torch.autograd.grad(compiled(*inputs, slopes), [*inputs, slopes])
    for result, right in zip(results, expected, strict=True):
        assert torch.allclose(result.float(), right.float(), rtol=2e-2, atol=2e-2)


def test_checkpointed_and_compiled_for_any_size(hopper, kernels):
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, 200, 200, 4, 2, 64)
    q.requires_grad_()
    slopes = torch.rand(4, device=hopper, requires_grad=True)

    def call(q, k, v, slopes):
        return flash_attn_func(q, k, v, causal=True, variant=variants.alibi(slopes))

    def checkpointed(*inputs):
        return torch.utils.checkpoint.checkpoint(call, *inputs, use_reentrant=False)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    right, *others = (
        torch.autograd.grad(function(q, k, v, slopes).square().sum(), (q, slopes))
        for function in (call, checkpointed, compiled)
    )
    for grads in others:
        for grad, expected in zip(grads, right, strict=True):
            assert torch.allclose(grad.float(), expected.float(), rtol=2e-2, atol=2e-2)
    with pytest.raises(NotImplementedError, match=r"no torch\.func transforms on CUDA"):
        torch.func.grad(lambda q: call(q, k, v, slopes).sum())(q)


def test_a_mask_has_no_gradient_and_a_weight_none_here(hopper):
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 64, 64, 2, 2, 64)
    gate = torch.rand(64, device=hopper, requires_grad=True)
    tensors = {"gate": ("float32", "key")}
    shown = Variant("shown_by", mask="return gate[key] > 0.5f;", tensors=tensors)
    assert not flash_attn_func(q, k, v, variant=shown(gate=gate)).requires_grad
    weighed = Variant("weighed_by", weight="return gate[key];", tensors=tensors)
    with pytest.raises(NotImplementedError, match="no gradient of gate on CUDA"):
        flash_attn_func(q, k, v, variant=weighed(gate=gate))


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_dropout_alibi_and_softcap_of_flash_attention_2(hopper, rate):
    """In one kernel, which compiles here; V shows P."""
    torch.manual_seed(0)
    q, k = (2 * torch.randn(2, 2, 64, 4, 64, device=hopper)).bfloat16().requires_grad_()
    shown = torch.eye(64, device=hopper).bfloat16()[None, :, None].expand(2, 64, 4, 64)
    slopes = torch.rand(2, 4, device=hopper)
    p = fa2.flash_attn_func(q, k, shown, rate, 0.2, True, softcap=0.7, alibi_slopes=slopes)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 0.2
    place = torch.arange(64, device=hopper)
    far = (place[:, None] - place).abs()
    scores = 0.7 * torch.tanh(scores / 0.7) - slopes[..., None, None] * far
    scores = scores.masked_fill(place > place[:, None], -math.inf)
    exact = scores.softmax(-1).transpose(1, 2)
    kept = (p != 0) if rate else exact > 0
    if rate:
        assert 0.72 < kept[exact > 1e-6].double().mean() < 0.78
    right = exact * kept / (1 - rate)
    torch.testing.assert_close(p.double(), right, rtol=0.02, atol=1e-4)
    grad = torch.randn_like(p)
    grads = (torch.autograd.grad(out, (q, k), grad.to(out.dtype)) for out in (p, right))
    for given, of_right in zip(*grads, strict=True):
        assert (given - of_right).norm() < 0.02 * of_right.norm()


def test_what_has_no_kernels_is_refused(hopper):
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 64, 64, 2, 2, 64)
    broken = Variant("broken", score="\nreturn scores;")
    with pytest.raises(RuntimeError, match=r"score of variant broken.*2.*scores") as raised:
        flash_attn_func(q, k, v, variant=broken)
    assert "error" in str(raised.value)
    narrow = Variant("narrow", score="float const x = score;\nreturn x;")
    assert flash_attn_func(q, k, v, variant=narrow).isfinite().all()
    with pytest.raises(NotImplementedError, match="variant narrow has no gradient"):
        flash_attn_func(q.requires_grad_(), k, v, variant=narrow)
    python = Variant("python", score_python=lambda score: score)
    with pytest.raises(NotImplementedError, match="has score_python, but no score"):
        flash_attn_func(q, k, v, variant=python)
