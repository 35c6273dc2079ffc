"""The criterion itself: it passes what rounding explains and refuses what it does not."""

import pytest
import torch
from oracle import Attention, assert_rows
from parity import DTYPES, assert_gradients_right, assert_right, random_qkv

MASKS = {"full": False, "causal": True}


def rounded(problem, dtype, grad_out, lost_key=None, lost_query=None):
    """Output, LSE and gradients of an `Attention` as a kernel rounds: P, dS and results once.
    Row 1 of the last head loses a key, key 1 of it a query."""
    p = problem.p.float()
    if lost_key is not None:
        p[:, -1, 1, lost_key] = 0.0
    v, q, k = (t.float() for t in (problem.v, problem.q, problem.k))
    total = p.sum(-1, keepdim=True)
    # A kernel's P is relative to a maximum
    origin = p.amax(-1, keepdim=True).clamp(min=1e-30)
    out = ((p / origin).to(dtype).float() @ v * origin / total.clamp(min=1e-30)).to(dtype)
    do = grad_out.float().transpose(1, 2)
    delta = (do * out.float()).sum(-1, keepdim=True)
    p16 = p.to(dtype).float()
    ds16 = (p16 * (do @ v.mT - delta)).to(dtype).float()
    grad_q = (ds16 @ k * problem.scale).to(dtype)
    if lost_query is not None:
        p16[:, -1, lost_query, 1] = ds16[:, -1, lost_query, 1] = 0.0
    grads = ds16.mT @ q * problem.scale, p16.mT @ do
    grad_k, grad_v = (
        t.unflatten(1, (problem.key_heads, problem.group)).sum(2).to(dtype) for t in grads
    )
    lse = problem.lse + total.log()[..., 0]
    return out.transpose(1, 2), lse, tuple(t.transpose(1, 2) for t in (grad_q, grad_k, grad_v))


def all_of(dtype, mask, batch, seqlen_q, seqlen_k, heads, key_heads, head_dim, **lost):
    q, k, v = random_qkv("cpu", dtype, batch, seqlen_q, seqlen_k, heads, key_heads, head_dim)
    grad_out, _, _ = random_qkv("cpu", dtype, batch, seqlen_q, 0, heads, 1, head_dim, seed=3)
    call = (q, k, v, head_dim**-0.5, MASKS[mask])
    problem = Attention(*call)
    return call, problem, grad_out, rounded(problem, dtype, grad_out, **lost)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 256])
@pytest.mark.parametrize(
    "seqlens", [(1, 1), (3, 2), (9, 5), (64, 64), (1, 900), (500, 600)], ids=str
)
def test_rounding_passes(seqlens, head_dim, dtype, mask):
    seqlen_q, seqlen_k = seqlens
    batch = 8 if seqlen_q < 100 else 1
    call, _, grad_out, (out, lse, grads) = all_of(
        DTYPES[dtype], mask, batch, seqlen_q, seqlen_k, 4, 2, head_dim
    )
    assert_right(out, lse, *call)
    assert_gradients_right(grads, grad_out, None, *call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_all_alike_pass(dtype):
    """Errors that point the same way are longer by chance than errors in all directions."""
    q, k, v = random_qkv("cpu", DTYPES[dtype], 4, 300, 300, 4, 2, 64)
    v = v[:, :, :, :1].expand(v.shape).contiguous()
    grad_out = torch.randn(1, 1, 1, 64).to(q.dtype).expand(q.shape)
    call = (q, k, v, 0.125, False)
    out, lse, grads = rounded(Attention(*call), q.dtype, grad_out)
    assert_right(out, lse, *call)
    assert_gradients_right(grads, grad_out, None, *call)


def test_a_sum_below_fp32_may_be_lost_before_a_large_scale():
    """dK = scale * dS^T Q: what the scale makes of 2^-126 is allowed, and nothing much larger."""
    q, k, v = random_qkv("cpu", torch.bfloat16, 2, 1, 2000, 4, 2, 64)
    q, scale = (q.double() * 2.0**-30).to(q.dtype), 1e10  # scores of 100
    least = scale * 2.0**-126
    grad_out, _, _ = random_qkv("cpu", q.dtype, 2, 1, 0, 4, 1, 64, seed=1)
    problem = Attention(q, k, v, scale, False)
    _, _, (_, grad_k, _) = rounded(problem, q.dtype, grad_out)
    exact, allowed = problem.gradients(grad_out)[1]
    flushed = grad_k.masked_fill(exact.abs() < least, 0.0)
    lengths = exact.norm(dim=-1)
    assert ((flushed == 0).all(-1) & (lengths > least)).any()
    assert_rows("k", flushed, exact, allowed)
    row = lengths.masked_fill(lengths < 50 * least, 1e30).argmin()
    flushed.view(-1, 64)[row] = 0.0
    with pytest.raises(AssertionError, match="k: 1 of 8000 rows"):
        assert_rows("k", flushed, exact, allowed)


def average(weights):
    """Which of the weights is the nearest to the mean of their magnitudes."""
    return int((weights.abs() - weights.abs().mean()).abs().argmin())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_one_lost_key_of_4096_is_refused(head_dim, dtype):
    """In a single row; of the output and of q's gradient."""
    sizes = (DTYPES[dtype], "full", 1, 40, 4096, 2, 1, head_dim)
    _, problem, _, _ = all_of(*sizes)
    *_, (out, lse, _) = all_of(*sizes, lost_key=average(problem.p[0, -1, 1]))
    with pytest.raises(AssertionError, match=r"output: 1 of 80 rows are wrong.* row \(0, 1, 1\)"):
        assert_rows("output", out, problem.out, problem.out_allowed())
    assert_rows(
        "LSE", lse[:, :1, :, None], problem.lse[:, :1, :, None], problem.lse_allowed()[:, :1]
    )
    with pytest.raises(AssertionError, match=r"LSE: 1 of 80"):
        assert_rows("LSE", lse[..., None], problem.lse[..., None], problem.lse_allowed())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_one_lost_query_of_4096_is_refused(head_dim, dtype):
    sizes = (DTYPES[dtype], "full", 1, 4096, 40, 1, 1, head_dim)
    _, problem, grad_out, (_, _, good) = all_of(*sizes)
    exact = problem.gradients(grad_out)
    for grad, right in zip(good, exact, strict=True):
        assert_rows("gradient", grad, *right)
    lost = average(problem.p[0, -1, :, 1])
    *_, (_, _, grads) = all_of(*sizes, lost_query=lost)
    with pytest.raises(AssertionError, match=r"v: 1 of 40 rows are wrong.* \(0, 1, 0\)"):
        assert_rows("v", grads[2], *exact[2])
    # Most of dK's terms are small: lost is one as large as their root mean square
    terms = (problem.p * (grad_out.double().transpose(1, 2) @ problem.v.mT))[0, -1, :, 1]
    terms = terms * problem.q[0, -1].norm(dim=-1)
    lost = int((terms.abs() - terms.square().mean().sqrt()).abs().argmin())
    *_, (_, _, grads) = all_of(*sizes, lost_query=lost)
    with pytest.raises(AssertionError, match=r"k: 1 of 40 rows are wrong.* \(0, 1, 0\)"):
        assert_rows("k", grads[1], *exact[1])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_one_row_of_64_normalised_wrongly_is_refused(head_dim, dtype, mask):
    _, problem, grad_out, (out, _, grads) = all_of(DTYPES[dtype], mask, 1, 64, 64, 1, 1, head_dim)
    results = {
        "output": (out, (problem.out, problem.out_allowed())),
        **dict(zip("qkv", zip(grads, problem.gradients(grad_out), strict=True), strict=True)),
    }
    for name, (result, right) in results.items():
        assert_rows(name, result, *right)
        for factor in (1.015, 0.985):
            off = result.clone()
            off[:, 40] *= factor
            with pytest.raises(AssertionError, match=rf"{name}: 1 of 64 rows"):
                assert_rows(name, off, *right)


def test_what_is_not_finite():
    exact = torch.tensor([[1.0, torch.nan], [1.0, 2.0]], dtype=torch.float64)
    allowed = torch.tensor([torch.nan, 0.1], dtype=torch.float64)
    assert_rows("x", torch.tensor([[1.0, torch.inf], [1.0, 2.05]]), exact, allowed)
    with pytest.raises(AssertionError, match="finite where the definition is not"):
        assert_rows("x", torch.tensor([[1.0, 1.0], [1.0, 2.0]]), exact, allowed)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(AssertionError, match="1 of 2 rows"):
            assert_rows("x", torch.tensor([[1.0, torch.nan], [1.0, wrong]]), exact, allowed)
