"""Parts of attention, made one."""

import math

import pytest
import torch
from oracle import assert_rows
from parity import assert_right
from torch._subclasses import FakeTensorMode

from cute_kernels import flash_attn_combine, flash_attn_func


def parts_of(q, k, v, cuts):
    """Outputs and LSEs of parts of the keys, as the function takes them."""
    results = [
        flash_attn_func(q, k[:, a:b], v[:, a:b], return_lse=True)
        for a, b in zip([0, *cuts], [*cuts, k.shape[1]], strict=True)
    ]
    out = torch.stack([out.float() for out, _ in results])
    return out, torch.stack([lse.transpose(1, 2) for _, lse in results])


@pytest.mark.parametrize("cuts", [[], [1], [20, 20, 50], list(range(3, 70, 4))], ids=len)
def test_parts_of_the_keys_are_the_whole(cuts):
    """Also parts without keys."""
    q, k, v = torch.randn(3, 2, 70, 4, 40)
    q = q[:, :9]
    out, lse = flash_attn_combine(*parts_of(q, k, v, cuts))
    assert out.shape == q.shape and lse.shape == (2, 9, 4)
    assert lse.stride() == (36, 1, 9)
    assert_right(out, lse.transpose(1, 2), q, k, v, 40**-0.5, False)


def random_parts(device, splits=5, dtype=torch.float32, seed=0):
    """Of N(0, 1) and of LSEs far apart; the parts without keys hold NaN, one row has no others."""
    generator = torch.Generator(device).manual_seed(seed)
    how = {"generator": generator, "device": device, "dtype": dtype}
    out, lse = torch.randn(splits, 3, 7, 4, 16, **how), 40 * torch.randn(splits, 3, 7, 4, **how)
    empty = torch.rand(lse.shape, generator=generator, device=device) < 0.3
    empty[:, 1, 2, 3] = True
    return out.masked_fill(empty[..., None], math.nan), lse.masked_fill(empty, -math.inf)


def test_parts_without_a_weight_add_nothing(device):
    """Their share is no number of float32."""
    out = torch.tensor([[math.nan] * 8, [3.0] * 8, [math.inf] * 8], device=device)
    lse = torch.tensor([-200.0, 5.0, -math.inf], device=device)
    combined, of_all = flash_attn_combine(out.view(3, 1, 1, 1, 8), lse.view(3, 1, 1, 1))
    assert combined.flatten().tolist() == [3.0] * 8
    assert of_all.item() == 5.0


def assert_combined(out, lse, out_partial, lse_partial):
    right_lse = lse_partial.double().logsumexp(0)
    weights = (lse_partial.double() - right_lse).exp().nan_to_num(0.0)
    terms = weights[..., None] * out_partial.double().nan_to_num(0.0)
    right = terms.sum(0)
    noise = torch.finfo(out_partial.dtype).eps * (8 + lse_partial.clamp(min=0).amax(0).abs())
    allowed = terms.norm(dim=-1).sum(0) * noise
    allowed = allowed + right.norm(dim=-1) * torch.finfo(out.dtype).eps / 2
    assert_rows("output", out, right, allowed)
    assert torch.equal(lse == -math.inf, right_lse == -math.inf)
    assert not out[right_lse == -math.inf].any()
    torch.testing.assert_close(lse, right_lse.to(lse.dtype), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("splits", [0, 1, 5, 130])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float16])
def test_random_parts(splits, out_dtype):
    parts = random_parts("cpu", splits)
    out, lse = flash_attn_combine(*parts, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or torch.float32)
    if splits == 0:
        assert not out.any() and (lse == -math.inf).all()
    else:
        assert_combined(out, lse, *parts)
    given = torch.empty(3, 7, 4, 20, dtype=out.dtype)[..., :16]
    again, _ = flash_attn_combine(*parts, given)
    assert again is given
    assert torch.equal(given, out)


def test_any_strides():
    out, lse = random_parts("cpu", dtype=torch.float64)
    out = out.permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4)
    lse = lse.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert_combined(*flash_attn_combine(out, lse), out, lse)


def test_shape_inference():
    parts = random_parts("cpu")
    real = flash_attn_combine(*parts, out_dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in parts]
        results = flash_attn_combine(*fake, out_dtype=torch.bfloat16)
    for a, b in zip(results, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_operator():
    operator = torch.ops.cute_kernels.flash_attn_combine.default
    done = torch.library.opcheck(operator, random_parts("cpu"))
    assert set(done.values()) == {"SUCCESS"}


BAD = {
    "rank": ({"out": lambda x: x[0]}, ValueError, r"out_partial has shape \(3, 7, 4, 16\), must"),
    "dtype": ({"out": lambda x: x.half()}, TypeError, "out_partial has dtype torch.float16"),
    "lse dtype": ({"lse": lambda x: x.double()}, TypeError, "lse_partial has dtype torch.float64"),
    "lse shape": (
        {"lse": lambda x: x.transpose(2, 3)},
        ValueError,
        r"lse_partial has shape \(5, 3, 4, 7\), must be \(splits, batch, seqlen, heads\) = \(5",
    ),
    "strided": (
        {"out": lambda x: x.repeat_interleave(2, -1)[..., ::2]},
        ValueError,
        "out_partial has strides .*, its last dimension",
    ),
    "no tensor": ({"lse": lambda x: None}, TypeError, "lse_partial is a NoneType, must be a torch"),
    "gradient": (
        {"lse": lambda x: x.requires_grad_()},
        NotImplementedError,
        "flash_attn_combine has no gradient: call it under torch.no_grad",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_refused(bad):
    changes, error, message = BAD[bad]
    parts = dict(zip(("out", "lse"), random_parts("cpu"), strict=True))
    changed = {name: changes.get(name, lambda x: x)(x) for name, x in parts.items()}
    with pytest.raises(error, match=f"^{message}"):
        flash_attn_combine(changed["out"], changed["lse"])


def test_refused_outputs():
    parts = random_parts("cpu")
    with pytest.raises(TypeError, match=r"^out_dtype is torch\.int32, must be float32 or float16"):
        flash_attn_combine(*parts, out_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^out has shape \(3, 7, 4, 8\), must be \(3, 7, 4, 16\)"):
        flash_attn_combine(*parts, torch.empty(3, 7, 4, 8))
    with pytest.raises(TypeError, match=r"^out has dtype torch\.float16, must be torch\.float32"):
        flash_attn_combine(*parts, torch.empty(3, 7, 4, 16).half(), torch.float32)
