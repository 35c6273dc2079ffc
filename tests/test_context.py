"""Context parallelism on the CPU: every form, against the definition on the whole sequence."""

import functools
import itertools

import pytest
import ranks as processes
import torch
from context import random_cases, run_cases
from oracle import Attention
from packed import Packed, assert_packed_right
from parity import assert_gradients_right, assert_right

COUNTS = {2: 40, 3: 20, 4: 30, 8: 15}


@functools.cache
def results(ranks):
    cases = random_cases(ranks, COUNTS[ranks])
    return cases, processes.run(ranks, run_cases, cases)


@pytest.mark.parametrize(
    ("ranks", "number"), [(ranks, i) for ranks, count in COUNTS.items() for i in range(count)]
)
def test_forms(ranks, number):
    cases, by_rank = results(ranks)
    case = cases[number]
    first, *others = [results[number] for results in by_rank]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert_case_right(case, first)


def assert_case_right(case, results):
    q, k, v, sinks, *upstream = case.tensors()
    scale = q.shape[-1] ** -0.5
    variant = {"window_size": case.window_size, "softcap": case.softcap, "sinks": sinks}
    out, lse, *grads = results
    if sinks is not None:
        assert_sinks_gradient_right(case, grads.pop())
    if case.documents is None:
        assert_right(out, lse, q, k, v, scale, case.causal, **variant)
        assert_gradients_right(grads, *upstream, q, k, v, scale, case.causal, **variant)
    else:
        slots = [b - a for a, b in itertools.pairwise(case.documents)]
        packed = Packed(q, k, v, slots, slots)
        assert_packed_right([out, lse, *grads[:3]], packed, upstream, scale, case.causal, **variant)


def assert_sinks_gradient_right(case, gradient):
    """Of documents it is the sum over them."""
    q, k, v, sinks, grad_out, grad_lse = case.tensors()
    options = {"window_size": case.window_size, "softcap": case.softcap, "sinks": sinks}
    right = allowed = 0.0
    for start, stop in itertools.pairwise(case.documents or (0, case.tokens)):
        rows = [x[None] if case.documents else x for x in (q, k, v, grad_out)]
        q_part, k_part, v_part, grad = (x[:, start:stop] for x in rows)
        of_lse = grad_lse[None] if case.documents else grad_lse
        scale = q.shape[-1] ** -0.5
        exact = Attention(q_part, k_part, v_part, scale, case.causal, **options)
        one, more = exact.sinks_gradient(grad, of_lse[..., start:stop], case.dtype)
        right, allowed = right + one, allowed + more
    assert ((gradient - right).abs() <= allowed).all()
