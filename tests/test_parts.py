"""Attention to parts of the keys: dense and packed calls, their gradients too, made of parts."""

import dataclasses
import math
import random

import pytest
import torch
from key_parts import INF, lengths_of
from oracle import Attention, assert_rows
from packed import assert_packed_right, random_grads, random_packed
from parity import assert_right, random_qkv, skip_unless_answered

from cute_kernels.parts import Mask, attend_part, merge_part_, merge_parts, part_gradients_


def window_of(mask):
    """`causal` and `window_size` of the oracle, where a limit of -1 is none."""
    return tuple(-1 if limit is None else limit for limit in mask[:2])


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
