"""Variants with random tensors, and what each of them means in fp64."""

import math
from typing import NamedTuple

import torch
from oracle import Changes, assert_rows

from cute_kernels import Variant, variants
from cute_kernels.variants.philox import uniform

# Of a score and of tensors with gradients: not linear in either, and of both kinds of axes.
WARPED = Variant(
    "warped",
    score="auto const x = score * gain[head] + shift[batch];\n"
    "return x > 0.f ? x / (1.f + 0.125f * x) : 0.5f * tanh(x) + limit * sigmoid(x * 0.25f);",
    score_python=lambda score, batch, head, gain, shift, limit: _warped(
        score * gain[head] + shift[batch], limit
    ),
    tensors={"gain": ("float32", "head"), "shift": ("float32", "batch")},
    numbers={"limit": float},
)
# Hooks together, a table of its own size, and indices beyond its ends.
MIXED = Variant(
    "mixed",
    score="return score + table[head][key - position + 8];",
    mask="return (key + query) % skip != 0;",
    weight="return 0.5f + 0.25f * ((query + 2 * key) % 4);",
    score_python=lambda score, head, key, position, table: (
        score + table[head, (key - position + 8).clamp(0, 16)]
    ),
    mask_python=lambda query, key, skip: (key + query) % skip != 0,
    weight_python=lambda query, key: 0.5 + 0.25 * ((query + 2 * key) % 4),
    tensors={"table": ("bfloat16", "head", 17)},
    numbers={"skip": int},
)
# The score as it is, but NaN at 0, which hooks are asked about where nothing is seen.
SINGULAR = Variant(
    "singular",
    score="auto const sign = score * rsqrt(score * score);\nreturn score * sign * sign;",
    score_python=lambda score: score,
)
OWN_GRADIENT = Variant(
    "square",
    score="return 0.1f * score * score;",
    score_gradient="return 0.2f * score;",
    score_python=lambda score: 0.1 * score * score,
)


def _warped(x, limit):
    return torch.where(x > 0, x / (1 + 0.125 * x), 0.5 * x.tanh() + limit * (x * 0.25).sigmoid())


class Case(NamedTuple):
    bound: object  # what variant= takes
    changes: Changes  # the same in fp64
    with_gradients: dict  # captured tensors by name


def alibi(chance, device, batch, heads, seqlen_q, seqlen_k):
    slopes = torch.rand(heads, device=device, requires_grad=True)
    at = seqlen_k - seqlen_q

    def score(scores, b, h, i, j):
        return scores + slopes.detach().double()[h] * (j - i - at)

    return Case(variants.alibi(slopes), Changes(score), {"slopes": slopes})


def bias(chance, device, batch, heads, seqlen_q, seqlen_k):
    shape = [(batch, heads, seqlen_q, seqlen_k), (heads, seqlen_q, seqlen_k), (1, seqlen_k)]
    dtype = chance.choice([torch.float32, torch.bfloat16])
    values = torch.randn(chance.choice(shape), device=device).to(dtype).requires_grad_()

    def score(scores, b, h, i, j):
        return scores + values.detach().double()

    return Case(variants.bias(values), Changes(score), {"bias": values})


def document(chance, device, batch, heads, seqlen_q, seqlen_k):
    of_query, of_key = (
        torch.randint(0, 4, (batch, n), device=device).sort().values.int()
        for n in (seqlen_q, seqlen_k)
    )

    def mask(b, h, i, j):
        return of_query[b, i] == of_key[b, j]

    return Case(variants.document(of_query, of_key), Changes(mask=mask), {})


def prefix_lm(chance, device, batch, heads, seqlen_q, seqlen_k):
    prefix = torch.randint(0, seqlen_k + 1, (batch,), device=device).int()

    def mask(b, h, i, j):
        return (j <= i + seqlen_k - seqlen_q) | (j < prefix[b])

    return Case(variants.prefix_lm(prefix), Changes(mask=mask), {})


def dilated(chance, device, batch, heads, seqlen_q, seqlen_k):
    count, step = chance.choice([(5, 3), (40, 2), (1, 1)])

    def mask(b, h, i, j):
        distance = i + seqlen_k - seqlen_q - j
        return (distance >= 0) & (distance < count * step) & (distance % step == 0)

    return Case(variants.dilated(count, step), Changes(mask=mask), {})


def softcap(chance, device, batch, heads, seqlen_q, seqlen_k):
    cap = chance.choice([0.7, 5.0, 50.0])
    return Case(variants.softcap(cap), Changes(lambda scores, *_: cap * (scores / cap).tanh()), {})


def dropout(chance, device, batch, heads, seqlen_q, seqlen_k):
    rate = chance.choice([0.1, 0.5])
    state = torch.tensor([chance.randrange(2**62), chance.randrange(2**40)], device=device)

    def weight(b, h, i, j):
        return (uniform(state[0], state[1], b, h, i, j) >= rate) / (1 - rate)

    return Case(variants.dropout(rate, state), Changes(weight=weight), {})


def warped(chance, device, batch, heads, seqlen_q, seqlen_k):
    gain, shift = (torch.randn(n, device=device, requires_grad=True) for n in (heads, batch))

    def score(scores, b, h, i, j):
        return _warped(scores * gain.detach().double()[h] + shift.detach().double()[b], 0.75)

    bound = WARPED(gain=gain, shift=shift, limit=0.75)
    return Case(bound, Changes(score), {"gain": gain, "shift": shift})


def mixed(chance, device, batch, heads, seqlen_q, seqlen_k):
    table, skip = torch.randn(heads, 17, device=device).bfloat16(), chance.choice([2, 3, 7])
    at = seqlen_k - seqlen_q

    def score(scores, b, h, i, j):
        return scores + table.double()[h, (j - i - at + 8).clamp(0, 16)]

    changes = Changes(
        score,
        lambda b, h, i, j: (j + i) % skip != 0,
        lambda b, h, i, j: 0.5 + 0.25 * ((i + 2 * j) % 4),
    )
    return Case(MIXED(table=table, skip=skip), changes, {})


def own_gradient(*_):
    return Case(OWN_GRADIENT(), Changes(lambda scores, *_: 0.1 * scores * scores), {})


def singular(*_):
    return Case(SINGULAR(), Changes(lambda scores, *_: scores), {})


CASES = {
    case.__name__: case
    for case in (
        *(alibi, bias, document, prefix_lm, dilated, softcap, dropout, warped, mixed),
        *(own_gradient, singular),
    )
}


def assert_results(out, lse, exact):
    """Every row of the output and every LSE of a dense call."""
    assert_rows("output", out, exact.out, exact.out_allowed())
    empty = exact.lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    lse, right, allowed = (
        t.masked_fill(empty, 0.0)[..., None] for t in (lse, exact.lse, exact.lse_allowed())
    )
    assert_rows("LSE", lse, right, allowed[..., 0])
    assert not out.transpose(1, 2)[exact.unseen].any()


def assert_gradients(grads, exact, grad_out, grad_lse):
    """Of q, k and v."""
    for name, grad, right in zip("qkv", grads, exact.gradients(grad_out, grad_lse), strict=True):
        assert_rows(f"gradient of {name}", grad, *right)


def assert_captured_gradients(grads, case, exact, grad_out, grad_lse):
    """Of captured tensors: by autograd in fp64, each number within what sums of as many rounded
    terms may be off by."""
    if not case.with_gradients:
        return
    do = grad_out.double().transpose(1, 2)
    dp = (do @ exact.v.mT).masked_fill(~exact.seen, 0.0)
    delta, delta_squares = exact._delta(do, dp, grad_lse, None)
    terms = (exact.p * (dp - delta)).masked_fill(~exact.seen, 0.0)
    # delta is a sum that may cancel, and off by what its terms are rounded to.
    rough = exact.p * (dp.abs() + delta.abs() + delta_squares.sqrt() / exact.u)
    scores = (exact.q @ exact.k.mT) * exact.scale
    batch, heads, rows, keys = scores.shape
    device = scores.device
    names = {
        "batch": torch.arange(batch, device=device)[:, None, None, None],
        "head": torch.arange(heads, device=device)[:, None, None],
        "query": torch.arange(rows, device=device)[:, None],
        "key": torch.arange(keys, device=device),
    }
    names["position"] = names["query"] + keys - rows
    names["score"] = scores
    sizes = {"batch": batch, "head": heads, "query": rows, "key": keys}
    for (name, tensor), grad in zip(case.with_gradients.items(), grads, strict=True):
        assert grad.dtype == tensor.dtype
        assert grad.shape == tensor.shape
        leaf = tensor.detach().double().requires_grad_()
        changed = changed_by(case, name, names, sizes)
        # A score depends on one number of the tensor: its slope is the tangent of all of them.
        _, slope = torch.func.jvp(changed, (leaf,), (torch.ones_like(leaf),))
        right, most, squares = (
            torch.autograd.grad(changed(leaf), leaf, weights)[0]
            for weights in (terms, rough * slope.sign(), rough.square() * slope)
        )
        # What a broadcast tensor adds up is rounded to its dtype before.
        rounded = torch.finfo(tensor.dtype).eps / 2 * most
        noise = exact.score_noise().amax() + 40 * exact.noise
        allowed = 6 * exact.u * squares.sqrt() + 3 * exact.u * right.abs() + noise * most
        error = (grad.double() - right).abs()
        assert (error <= allowed + rounded + 1e-6).all(), (
            f"gradient of {name}: off by {(error / (allowed + rounded + 1e-6)).max().item():.3g} "
            "times what is allowed"
        )


def changed_by(case, name, names, sizes):
    """The scores as a function of one captured tensor."""
    variant = case.bound.variant
    shape = [sizes[axis] for axis in variant.hooks.tensor(name).axes]
    function = variant.python["score"]
    given = case.bound.captured() | {
        n: t.detach().double() for n, t in case.with_gradients.items() if n != name
    }

    def changed(value):
        values = {**names, **given, name: value.expand(shape)}
        code = function.__code__
        return function(**{n: values[n] for n in code.co_varnames[: code.co_argcount]})

    return changed
