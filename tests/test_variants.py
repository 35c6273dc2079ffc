"""Variants on the CPU, where hooks are Python functions, and what is refused everywhere."""

import math
import random
import re

import pytest
import torch
from configure import ROOT
from oracle import Attention
from variant_cases import (
    CASES,
    assert_captured_gradients,
    assert_gradients,
    assert_results,
)

from cute_kernels import BlockMask, Variant, flash_attn_func, flash_attn_varlen_func, variants
from cute_kernels.compile.hooks import KNOWN, hooks_source
from cute_kernels.variants.philox import uniform

SHIFTED = Variant(
    "shifted",
    score="return score + shift[head];",
    score_python=lambda score, head, shift: score + shift[head],
    tensors={"shift": ("float32", "head")},
)


def qkv(batch=2, seqlen_q=40, seqlen_k=50, heads=4, key_heads=2, dtype=torch.float32):
    shapes = [(seqlen_q, heads), (seqlen_k, key_heads), (seqlen_k, key_heads)]
    return [torch.randn(batch, rows, n, 16, dtype=dtype).requires_grad_() for rows, n in shapes]


def check(name, chance, dtype, **call):
    batch, lengths = chance.choice([1, 2]), [chance.choice([1, 5, 130, 200]) for _ in "qk"]
    heads = chance.choice([(2, 2), (4, 2)])
    q, k, v = qkv(batch, *lengths, *heads, dtype)
    case = CASES[name](chance, "cpu", batch, heads[0], *lengths)
    out, lse = flash_attn_func(q, k, v, return_lse=True, variant=case.bound, **call)
    plain = [x.detach() for x in (q, k, v)]
    causal = call.pop("causal", False)
    exact = Attention(*plain, 16**-0.5, causal, changes=case.changes, **call)
    assert_results(out.detach(), lse.detach(), exact)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    captured = list(case.with_gradients.values())
    grads = torch.autograd.grad((out, lse), (q, k, v, *captured), (grad_out, grad_lse))
    assert_gradients(grads[:3], exact, grad_out, grad_lse)
    assert_captured_gradients(grads[3:], case, exact, grad_out, grad_lse)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_a_call_is_its_definition(name, seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    check(name, chance, [torch.float32, torch.float64, torch.float32][seed])


@pytest.mark.parametrize("seed", range(4))
def test_masks_and_sinks_beside_a_variant(seed):
    chance = random.Random(50 + seed)
    torch.manual_seed(seed)
    call = {"window_size": chance.choice([(30, -1), (-1, -1), (5, 20)])}
    call |= {"causal": chance.random() < 0.5, "sinks": torch.randn(4) if seed % 2 else None}
    name = chance.choice(["alibi", "document", "mixed", "softcap"])
    q, k, v = qkv(2, 60, 80, 4, 2)
    case = CASES[name](chance, "cpu", 2, 4, 60, 80)
    out, lse = flash_attn_func(q, k, v, return_lse=True, variant=case.bound, **call)
    plain = [x.detach() for x in (q, k, v)]
    exact = Attention(*plain, 16**-0.5, call.pop("causal"), changes=case.changes, **call)
    assert_results(out.detach(), lse.detach(), exact) if call["sinks"] is None else None
    allowed = exact.lse_allowed()
    seen = exact.lse > -math.inf
    assert ((lse - exact.lse).abs() <= allowed)[seen].all()


def test_packed_sequences_are_calls_of_their_own():
    lengths_q, lengths_k = [5, 0, 33, 1], [7, 4, 40, 0]
    starts_q, starts_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0)]).int() for n in (lengths_q, lengths_k)
    )
    q, k, v = (x.detach()[0].requires_grad_() for x in qkv(1, 39, 51))
    state, shift = torch.tensor([3, 4]), torch.randn(4, requires_grad=True)
    both = Variant(
        "both",
        score_python=lambda score, head, batch, key, shift: score + shift[head] * batch * key,
        weight_python=lambda batch, head, query, key, state: uniform(
            state[0], state[1], batch, head, query, key
        ),
        mask_python=lambda key_row, query_row: (key_row + query_row) % 3 > 0,
        tensors={"state": ("int64", 2), "shift": ("float32", "head")},
    )(state=state, shift=shift)
    out, lse = flash_attn_varlen_func(
        q, k, v, starts_q, starts_k, causal=True, return_lse=True, variant=both
    )
    grads = torch.autograd.grad(out.sum() + lse[lse > -math.inf].sum(), (q, k, v, shift))
    total = 0
    for i in range(4):
        rows, keys = (slice(int(starts[i]), int(starts[i + 1])) for starts in (starts_q, starts_k))
        if rows.stop == rows.start:
            continue
        part = [x.detach()[None, n] for x, n in ((q, rows), (k, keys), (v, keys))]
        a, b, c = (x.double()[0].transpose(0, 1) for x in part)
        scores = a @ b.repeat_interleave(2, 0).mT / 4
        key = torch.arange(keys.stop - keys.start)
        query = torch.arange(rows.stop - rows.start)[:, None]
        scores = scores + shift.detach().double()[:, None, None] * i * key
        seen = key <= query + len(key) - len(query)
        seen = seen & ((key + keys.start + query + rows.start) % 3 > 0)
        scores = scores.masked_fill(~seen, -math.inf)
        p = scores.softmax(-1).nan_to_num(0.0)
        heads = torch.arange(4)[:, None, None]
        p = p * uniform(state[0], state[1], torch.tensor(i), heads, query, key)
        exact = (p @ c.repeat_interleave(2, 0)).transpose(0, 1)
        assert (out[rows] - exact).abs().max() < 1e-5
        total += 1
    assert total == 3
    assert all(grad.isfinite().all() for grad in grads)


def test_what_a_hook_hides_has_no_part_in_anything():
    q, k, v = qkv(1, 6, 8)
    hidden = Variant(
        "hidden", mask_python=lambda query, key: (key < 4) | (query == 5), mask="return true;"
    )
    with torch.no_grad():
        k[:, 6], v[:, 5], v[:, 7] = math.nan, math.inf, math.nan
    out = flash_attn_func(q, k, v, variant=hidden)
    assert out[:, :5].isfinite().all()
    assert not out[:, 5].isfinite().any()
    for_all = Variant("for_all", mask_python=lambda key: key < 4)
    grads = torch.autograd.grad(flash_attn_func(q, k, v, variant=for_all).sum(), (q, k, v))
    assert all(grad[:, :4].isfinite().all() for grad in grads)
    assert not any(grad[:, 4:].any() for grad in grads[1:])


def test_what_a_hook_hides_has_no_part_in_captured_tensors():
    """Neither a NaN there in its weight nor one in the gradient of what its score is read with."""
    q, k, v = qkv(1, 6, 8)
    with torch.no_grad():
        k[:, 6] = math.nan
    gain = torch.rand(4, requires_grad=True)
    weights = torch.rand(8).masked_fill(torch.arange(8) > 3, math.nan)
    hidden = Variant(
        "hidden_captured",
        score_python=lambda score, head, gain: score * gain[head],
        mask_python=lambda key: key < 4,
        weight_python=lambda key, weights: weights[key],
        tensors={"gain": ("float32", "head"), "weights": ("float32", "key")},
    )
    results = []
    for count in (8, 4):
        inputs = (q, *(x[:, :count] for x in (k, v)))
        out = flash_attn_func(*inputs, variant=hidden(gain=gain, weights=weights[:count]))
        results.append((out, *torch.autograd.grad(out.square().sum(), (*inputs[:1], gain))))
    for with_hidden, without in zip(*results, strict=True):
        assert torch.allclose(with_hidden, without, rtol=1e-5, atol=1e-6)


def test_what_hidden_pairs_make_of_captured_tensors_has_no_part():
    """The derivative at hidden pairs is infinite, or there is nothing to read."""
    q, k, v = qkv(2, 140, 140)
    kerple = {
        "score_python": lambda score, head, position, key, rate: (
            score - rate[head] * torch.log1p((position - key).to(score.dtype))
        ),
        "tensors": {"rate": ("float32", "head")},
    }
    clamped = {
        **kerple,
        "score_python": lambda score, head, position, key, rate: (
            score - rate[head] * torch.log1p((position - key).clamp(min=0).to(score.dtype))
        ),
    }
    rate = torch.rand(4, requires_grad=True)
    results = []
    for name, hooks in (("kerple", kerple), ("clamped", clamped)):
        variant = Variant(name, score="return score;", **hooks)(rate=rate)
        out = flash_attn_func(q, k, v, causal=True, variant=variant)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, rate))))
    for own, right in zip(*results, strict=True):
        torch.testing.assert_close(own, right)
    table = torch.rand(5, requires_grad=True)
    relative = Variant(
        "relative",
        score="return score + table[key - position + 2];",
        score_python=lambda score, key, position, table: score + table[key - position + 2],
        tensors={"table": ("float32", 5)},
    )
    out = flash_attn_func(q, k, v, window_size=(2, 2), variant=relative(table=table))
    assert torch.autograd.grad(out.square().sum(), table)[0].isfinite().all()
    hidden = Variant(
        "hidden_all",
        score_python=lambda score, head, rate: score + (rate - rate.detach()).sqrt()[head],
        mask_python=lambda key: key < 0,
        tensors={"rate": ("float32", "head")},
    )
    out = flash_attn_func(q, k, v, variant=hidden(rate=rate))
    assert not torch.autograd.grad(out.sum(), rate)[0].any()


def test_gradients_of_mapped_calls():
    """Of a captured tensor that is mapped, which does not say that it requires a gradient."""
    q, k, v = (x.detach() for x in qkv(1, 6, 6))
    slopes = torch.rand(3, 4)

    def loss(slopes):
        out = flash_attn_func(q, k, v, causal=True, variant=variants.alibi(slopes))
        return out.square().sum()

    mapped = torch.func.grad(lambda x: torch.vmap(loss)(x).sum())(slopes)
    alone = torch.stack([torch.func.grad(loss)(x) for x in slopes])
    assert alone.any()
    torch.testing.assert_close(mapped, alone)


def test_gradients_of_what_has_no_part():
    """Of inputs that no hook uses, of no sequences at all, and of what only a mask reads."""
    q, k, v = qkv(1, 6, 8)
    flat = Variant("flat", score_python=lambda key: 0.0 * key)
    grads = torch.autograd.grad(flash_attn_func(q, k, v, variant=flat).sum(), (q, k, v))
    assert not grads[0].any() and not grads[1].any() and grads[2].any()
    none = [torch.randn(0, 2, 16, requires_grad=True) for _ in "qkv"]
    starts = torch.zeros(1, dtype=torch.int32)
    out = flash_attn_varlen_func(*none, starts, starts, variant=flat)
    assert all(x.shape[0] == 0 for x in torch.autograd.grad(out.sum(), none))
    gate = torch.rand(8, requires_grad=True)
    gated = Variant(
        "gated", mask_python=lambda key, gate: gate[key] > 0.5, tensors={"gate": ("float32", "key")}
    )
    frozen = [x.detach() for x in (q, k, v)]
    assert not flash_attn_func(*frozen, variant=gated(gate=gate)).requires_grad


def test_sinks_and_numbers_at_the_ends_of_a_float():
    q, k, v = (x.detach() for x in qkv(1, 6, 8))
    sinks = torch.tensor([math.inf, -math.inf, 0.0, 1e30])
    own = flash_attn_func(q, k, v, sinks=sinks, return_lse=True, variant=variants.dilated(8, 1))
    right = flash_attn_func(q, k, v, sinks=sinks, return_lse=True, window_size=(7, 0))
    for a, b in zip(own, right, strict=True):
        torch.testing.assert_close(a, b)
    scaled = Variant("scaled", score_python=lambda score, by: score * by, numbers={"by": float})
    for number in (1e39, -1e300, 10**50, 10**400):
        with pytest.raises(ValueError, match=re.escape(f"by is {number}, must be from")):
            scaled(by=number)


def test_a_row_that_sees_nothing_is_0():
    q, k, v = qkv(1, 6, 8)
    nothing = Variant("nothing", mask_python=lambda key: key < 0)
    out, lse = flash_attn_func(q, k, v, variant=nothing, return_lse=True)
    assert not out.any()
    assert (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not any(grad.any() for grad in grads)


def test_masks_of_numbers():
    """What is not 0 shows, as in C++."""
    ints = Variant("ints", mask_python=lambda query, key: (query ^ key) & 2)
    bools = Variant("bools", mask_python=lambda query, key: (query ^ key) & 2 != 0)
    q, k, v = torch.randn(3, 1, 150, 2, 16)
    for options in ({}, {"causal": True}):
        right = flash_attn_func(q, k, v, variant=bools, **options)
        assert torch.equal(flash_attn_func(q, k, v, variant=ints, **options), right)
    of_ints, of_bools = (BlockMask.from_mask(x, 1, 2, 150, 150) for x in (ints, bools))
    assert torch.equal(of_ints.kinds, of_bools.kinds)
    assert of_ints.kinds.any()
    given = flash_attn_func(q, k, v, variant=ints, block_mask=of_ints)
    assert torch.equal(given, flash_attn_func(q, k, v, variant=bools))


def test_random_numbers_are_even_and_their_own():
    i = torch.arange(64)
    zero, seed = torch.tensor(0), torch.tensor(2**62 + 12345)
    numbers = uniform(
        seed, torch.tensor(7), i[:2, None, None, None], i[:2, None, None], i[:, None], i
    )
    assert numbers.shape == (2, 2, 64, 64)
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert len(numbers.unique()) > 0.99 * numbers.numel()
    # Philox 4x32-10 of zeros: Random123's known answer
    first = uniform(zero, zero, zero, zero, zero, torch.arange(4))
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert (first.double() * 2**24).tolist() == [word >> 8 for word in known]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": "Alibi"}, ValueError, "name is 'Alibi'"),
        ({"name": 3}, TypeError, "name is 3"),
        ({"score": None}, ValueError, "has no hook"),
        ({"score": 3}, TypeError, "score is a int"),
        ({"tensors": {"head": ("float32",)}}, ValueError, "'head' cannot name a captured value"),
        ({"tensors": {"for": ("float32",)}}, ValueError, "'for' cannot name a captured value"),
        ({"numbers": {"captured": int}}, ValueError, "'captured' cannot name a captured value"),
        ({"tensors": {"bitand": ("int8",)}}, ValueError, "'bitand' cannot name a captured value"),
        ({"tensors": ["x"]}, TypeError, "tensors is a list"),
        ({"numbers": ["x"]}, TypeError, "numbers is a list"),
        ({"tensors": {"x": "float32"}}, TypeError, "tensors['x'] is 'float32'"),
        ({"tensors": {"x": ("float64",)}}, ValueError, "has dtype 'float64'"),
        ({"tensors": {"x": ("float32", "row")}}, ValueError, "has the axis 'row'"),
        ({"tensors": {"x": ("float32", "key", "key")}}, ValueError, "more than once"),
        ({"tensors": {"x": ("float32", 1, 2, 3, 4, 5)}}, ValueError, "has 5 axes"),
        ({"numbers": {"x": bool}}, TypeError, "must be int or float"),
        ({"numbers": {"x": int}, "tensors": {"x": ("int8",)}}, ValueError, "it is taken"),
        ({"score_python": 1}, TypeError, "score_python is 1"),
        ({"score_python": torch.tanh}, TypeError, "whose parameters Python does not know"),
        ({"score_python": lambda scores: scores}, ValueError, "the parameter 'scores'"),
        ({"mask_python": lambda score: score}, ValueError, "the parameter 'score'"),
        (
            {"score": None, "mask": "return true;", "score_gradient": "return 1.f;"},
            ValueError,
            "there is no score",
        ),
    ],
)
def test_definitions_that_are_refused(arguments, error, words):
    given = {"name": "mine", "score": "return score;", **arguments}
    with pytest.raises(error) as raised:
        Variant(given.pop("name"), **given)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("captured", "error", "words"),
    [
        ({}, TypeError, "needs shift"),
        ({"shift": 1.0}, TypeError, "shift is a float"),
        ({"shift": torch.zeros(4), "other": 1}, TypeError, "has no other; it has shift"),
        ({"shift": torch.zeros(3)}, ValueError, "dimension 0 (head) must be 4"),
        ({"shift": torch.zeros(4, 1)}, ValueError, "must have 1 dimensions: (head)"),
        ({"shift": torch.zeros(4).half()}, TypeError, "must be torch.float32"),
        ({"shift": torch.zeros(4, device="meta")}, ValueError, "shift is on meta"),
        ({"shift": torch.zeros(4).to_sparse()}, TypeError, "shift has layout torch.sparse_coo"),
    ],
)
def test_captured_tensors_that_are_refused(captured, error, words):
    with pytest.raises(error) as raised:
        flash_attn_func(*qkv(), variant=SHIFTED(**captured))
    assert words in str(raised.value)


def test_calls_that_are_refused():
    q, k, v = qkv()
    shifted = SHIFTED(shift=torch.zeros(1))
    for options, error, words in (
        ({"variant": "alibi"}, TypeError, "variant is a str"),
        ({"variant": SHIFTED}, TypeError, "needs shift"),
        ({"variant": shifted, "softcap": 1.0}, NotImplementedError, "softcap"),
        ({"variant": shifted, "softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"variant": shifted, "softcap": math.nan}, ValueError, "softcap is nan"),
        ({"variant": shifted, "attention_chunk": 8}, NotImplementedError, "attention_chunk"),
        ({"variant": shifted, "tile_config": "none"}, ValueError, "forward kernel of variant"),
        ({"variant": Variant("gpu", mask="return true;")}, NotImplementedError, "no mask_python"),
        ({"variant": shifted, "softmax_scale": -1.0}, ValueError, "softmax_scale"),
    ):
        with pytest.raises(error) as raised:
            flash_attn_func(q, k, v, **options)
        assert words in str(raised.value)


def test_scales_of_8_bits_are_refused_dense_and_packed():
    q, k, v = qkv()
    starts = torch.arange(q.shape[0] + 1, dtype=torch.int32) * q.shape[1]
    options = {"variant": SHIFTED(shift=torch.zeros(1)), "k_descale": torch.ones(1, 1)}
    with pytest.raises(NotImplementedError, match="variant is not there for float8_e4m3fn: pass q"):
        flash_attn_func(q, k, v, **options)
    with pytest.raises(NotImplementedError, match="variant is not there for float8_e4m3fn: pass q"):
        flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), starts, starts, **options)


def test_definitions_of_one_name_are_apart():
    """As in a notebook, whose cells run again and again."""
    first = Variant("again", score="return score;")
    same = Variant("again", score="return score;")
    other = Variant("again", score="return 2.f * score;")
    assert first.hooks.key == same.hooks.key != other.hooks.key
    assert KNOWN[first.hooks.key].score == "return score;"


def test_the_source_of_hooks_has_what_they_use():
    text = hooks_source(SHIFTED.hooks, ("shift",))
    assert "Variable<2, 1>" in text
    assert '#line 1 "score of variant shifted"\nreturn score + shift[head];' in text
    assert "kOfHeads" in text
    assert "here.query" not in text


def test_ready_made_variants_refuse():
    for call, error in (
        (lambda: variants.dropout(1.0, torch.zeros(2).long()), ValueError),
        (lambda: variants.dropout("no", torch.zeros(2).long()), TypeError),
        (lambda: variants.dilated(0, 1), ValueError),
        (lambda: variants.softcap(0.0), ValueError),
        (lambda: variants.bias(torch.zeros(3, 3).int()), TypeError),
        (lambda: variants.bias(torch.zeros(())), ValueError),
    ):
        with pytest.raises(error):
            call()


def test_transforms_and_compilers_see_the_operations():
    q, k, v = (x.detach() for x in qkv())
    shift = torch.randn(4)

    def loss(shift):
        return flash_attn_func(q, k, v, variant=SHIFTED(shift=shift)).square().sum()

    expected = torch.autograd.functional.jacobian(loss, shift)
    assert torch.allclose(torch.func.grad(loss)(shift), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_mapped_calls_are_calls_of_their_own(grad):
    """On the CPU, per-sample gradients included; in each, `batch` begins with 0."""
    q, k, v = torch.randn(3, 3, 2, 5, 4, 16)
    bias = torch.randn(2, 4, 5, 5)

    def call(q, v):
        return flash_attn_func(q, k[0], v, causal=True, variant=variants.bias(bias))

    def gradients(q, v):
        return torch.func.grad(lambda q, v: call(q, v).square().sum(), argnums=(0, 1))(q, v)

    of = gradients if grad else lambda q, v: (call(q, v),)
    alone = zip(*(of(*one) for one in zip(q, v, strict=True)), strict=True)
    for mapped, one_by_one in zip(torch.func.vmap(of)(q, v), alone, strict=True):
        assert (mapped - torch.stack(one_by_one)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["alibi", "own gradient", "ready-made", "block mask"])
def test_the_page_runs(name):
    text = (ROOT / "docs" / "variants.md").read_text()
    (code,) = re.findall(rf"<!-- snippet: {name} -->\n```python\n(.*?)```", text, re.S)
    names = {}
    exec(code.replace("torch.cuda.is_available()", "False"), names)
    if name in ("ready-made", "block mask"):
        assert names["out"].shape == names["q"].shape
    else:
        assert all(names[x].grad.isfinite().all() for x in "qkv")
    if name == "alibi":
        assert names["slopes"].grad.abs().min() > 0
