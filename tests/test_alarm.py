"""Gradients are computed a second time, with care for what masks hide, where that may matter: for
queries that see nothing only if they hold what 0 cannot be multiplied by."""

import math
import re

import pytest
import torch
from parity import BACKWARD_KERNELS, DTYPES, common_head_dim, random_qkv
from traces import CAREFUL, GRADIENTS, PLAIN, launches

from cute_kernels.operators import flash_attn_backward, flash_attn_forward

BLIND = 7  # queries that see nothing, the first ones
SPOILT = {
    "NaN in q": ("q", math.nan),
    "infinite q": ("q", -math.inf),
    "huge q": ("q", 3e38),
    "NaN in dO": ("d", math.nan),
    "infinite dO": ("d", math.inf),
    "huge dO": ("d", 3e38),
}


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_a_blind_query_holds_has_no_part(kernel, spoilt):
    """The same bits as with 0 in its place."""
    name, value = SPOILT[spoilt]
    if not kernel.causal or (kernel.dtype == torch.float16 and "huge" in spoilt):
        pytest.skip("no query is blind, or the value is infinite")
    sizes = (1, 200, 200 - BLIND, 4, 2, kernel.head_dim)
    q, k, v = random_qkv(kernel.device, kernel.dtype, *sizes)
    grad_out = torch.randn_like(q)
    results = []
    for inside in (0.0, value):
        tensors = {"q": q.clone(), "d": grad_out.clone()}
        tensors[name][:, BLIND - 3, 1, 5] = inside
        out, lse = flash_attn_forward(tensors["q"], k, v, 0.1, True)
        assert (lse[:, :, :BLIND] == -math.inf).all() and lse[:, :, BLIND:].isfinite().all()
        grads = kernel.backward(tensors["d"], None, tensors["q"], k, v, out, lse, 0.1)
        assert all(x.isfinite().all() for x in grads)
        results.append(grads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [1.0, 500.0, None], ids=["lse of 5", "lse of 2700", "of 3900"])
@pytest.mark.parametrize("row", GRADIENTS)
def test_care_alone_changes_no_bit(hopper, row, size):
    """Of queries that see one key P is 1 and dS 0, both but for rounding. What is left of dS is
    often halfway between two numbers of float16: the least difference of P tells which it is.
    Without a size that key is the query: then all products are positive, and P rounds up the most.
    """
    head_dim, dtype = common_head_dim(row), DTYPES[row["dtype"]]
    diagonal = -BLIND if row["any_call"] else None
    q, k, v = random_qkv(hopper, dtype, 32, 60 + BLIND, 60, 4, 2, head_dim)
    if size is None:
        first = torch.nn.functional.normalize(k[:, 0].float(), dim=-1)
        k[:, 0] = first * head_dim**0.5
        q[:, BLIND] = (first * (3900 / 0.1 / head_dim**0.5)).repeat_interleave(2, 1)
    else:
        q = q * (size * (128 / head_dim) ** 0.5)
    out, lse = flash_attn_forward(q, k, v, 0.1, True, diagonal=diagonal)
    largest = lse[lse.isfinite()].abs().max()
    assert largest < 4096  # which would raise the alarm by itself
    assert size == 1 or largest > (1000 if size else 3800)
    for _ in range(10):
        grad_out = torch.randn_like(q)
        results = []
        for inside in (0.0, math.inf):
            grad_out[-1, BLIND - 3, 1, 5] = inside
            inputs = (grad_out, None, q, k, v, out, lse, 0.1, True, False, row["name"])
            results.append(flash_attn_backward(*inputs, diagonal=diagonal))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("row", GRADIENTS)
def test_blind_queries_cost_nothing(hopper, row, tmp_path):
    """The careful kernel ends at once; not so where a seen value is NaN."""
    head_dim, dtype = common_head_dim(row), DTYPES[row["dtype"]]
    diagonal = -BLIND if row["any_call"] else None
    q, k, v = random_qkv(hopper, dtype, 1, 4096 + BLIND, 4096, 8, 8, head_dim)
    grad_out = torch.randn_like(q)

    def share():
        """Of the time of both kernels, the careful one's."""
        out, lse = flash_attn_forward(q, k, v, 0.1, True, diagonal=diagonal)
        assert (lse[:, :, :BLIND] == -math.inf).all()
        inputs = (grad_out, None, q, k, v, out, lse, 0.1, True, False, row["name"])
        seen = launches(lambda: flash_attn_backward(*inputs, diagonal=diagonal), tmp_path)
        plain, careful = (
            sum(time for name, _, time in seen if re.search(kernel, name))
            for kernel in (PLAIN, CAREFUL)
        )
        return careful / (plain + careful)

    assert share() < 0.2
    q[0, 3000, 2, 1] = math.nan
    assert share() > 0.3


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
@pytest.mark.parametrize("name", ["v", "d"])
def test_what_is_huge_and_hidden_has_no_part(kernel, name):
    """The same bits as with 0 in its place, of V and of dO. Alone in its call: all is finite, LSE
    and delta too, and only where the mask hides it are products of both beyond a float."""
    if not kernel.causal or kernel.dtype == torch.float16:
        pytest.skip("nothing is hidden, or no product is beyond a float")
    q, k, v = random_qkv(kernel.device, kernel.dtype, 1, 200, 200, 4, 2, kernel.head_dim)
    grad_out = torch.randn_like(q)
    if name == "v":  # of the last key; its query has a small dO, so that delta is finite
        spoilt, seen_by, sees = (slice(None), -1, 1), (slice(-1, None), slice(2, 4)), slice(None)
        grad_out[:, -1] *= 2.0**-10
    else:  # of the first query, and small what it sees
        spoilt, seen_by, sees = (slice(None), 0, 2), (slice(1), slice(2, 3)), slice(1)
        v[:, 0] *= 2.0**-20
    results = []
    for inside in (0.0, 3e38):
        tensors = {"v": v.clone(), "d": grad_out.clone()}
        tensors[name][spoilt] = inside
        out, lse = flash_attn_forward(q, k, tensors["v"], 0.1, True)
        delta = (out.double() * tensors["d"].double()).sum(-1)
        assert lse.isfinite().all() and out.isfinite().all() and delta.abs().max() < 3e38
        results.append(kernel.backward(tensors["d"], None, q, k, tensors["v"], out, lse, 0.1))
    for of, right, grad in zip("qkv", *results, strict=True):
        heads, rows = (seen_by[1], seen_by[0]) if of == "q" else (slice(1, 2), sees)
        same = grad == right
        same[:, rows, heads] = True
        assert same.all(), f"gradient of {of}: {(~same).nonzero()[:5].tolist()} differ"
