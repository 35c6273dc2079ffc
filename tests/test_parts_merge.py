"""Two results of parts of the keys made one, into new tensors and in place, against fp64."""

import math

import pytest
import torch
from key_parts import INF, padded, random_results
from oracle import assert_rows

from cute_kernels.parts import merge_part_, merge_parts


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
