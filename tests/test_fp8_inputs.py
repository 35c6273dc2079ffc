"""FP8 on inputs that are not N(0, 1): zeros, tiny scales, outliers, NaN, sizes of 0. And refusals,
which are the same on the CPU and on a GPU."""

import dataclasses
import math

import pytest
import torch
from parity import plain_attention, random_qkv

from cute_kernels import flash_attn_func, flash_attn_varlen_func
from cute_kernels.fp8 import GPU_BUILT, FP8Tensor, flash_attn_fp8_func, quantize_fp8

E4M3 = torch.float8_e4m3fn
DTYPES = {"e4m3": E4M3, "int8": torch.int8}


@pytest.fixture(autouse=True)
def _built(request):
    if not GPU_BUILT and "cuda" in str(request.node.callspec.params.get("device")):
        pytest.skip("built without CUTE_KERNELS_FP8")


def mean_of_visible(v, causal):
    if not causal:
        return v.double().mean(1, keepdim=True).expand_as(v)
    count = torch.arange(1, v.shape[1] + 1, device=v.device)[:, None, None]
    return v.double().cumsum(1) / count


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("seqlen", "causal"), [(128, True), (64, False), (100, True), (200, False), (1, True)]
)
def test_zeros_meet_masks(device, seqlen, causal, head_dim, to):
    zeros = torch.zeros(1, seqlen, 2, head_dim, device=device, dtype=torch.bfloat16)
    v = random_qkv(device, torch.bfloat16, 1, 1, seqlen, 2, head_dim=head_dim)[2]
    out, lse = flash_attn_fp8_func(
        zeros, zeros, v, causal=causal, qk_dtype=DTYPES[to], return_lse=True
    )
    exact = mean_of_visible(v, causal)
    assert (out - exact).norm() < 0.05 * exact.norm()
    count = torch.arange(1, seqlen + 1, device=device) if causal else torch.tensor(seqlen)
    assert (lse - count.to(lse).log()).abs().max() < 0.05


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("softmax_scale", [5e-39, 1e-44, 1e-50])
def test_tiny_scales(device, softmax_scale, to):
    q, k, v = random_qkv(device, torch.bfloat16, 1, 100, 100, 2)
    out = flash_attn_fp8_func(q, k, v, softmax_scale, causal=True, qk_dtype=DTYPES[to])
    exact = mean_of_visible(v, True)
    assert (out - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("size", [1, 1e14])
@pytest.mark.parametrize("softmax_scale", [1e10, 1e30, 3e38])
def test_huge_scales(device, softmax_scale, size, to):
    """Each query sees the key with its largest score; all of them are different keys."""
    q = size * torch.eye(64, device=device, dtype=torch.bfloat16).view(1, 64, 1, 64)
    v = random_qkv(device, torch.bfloat16, 1, 1, 64, 1)[2]
    options = {"incoherent": False, "smooth_k": False, "qk_dtype": DTYPES[to]}
    out = flash_attn_fp8_func(q, q, v, softmax_scale, **options)
    assert (out - v).norm() < 0.04 * v.norm()


@pytest.mark.parametrize("window_size", [(-1, -1), (300, 300)], ids=str)
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_small_numbers_of_large_scales(device, head_dim, to, window_size):
    """Scores are small whole numbers times factors near 1, another one for each block."""
    q, k = (torch.randint(-1, 2, (1, 512, 2, head_dim), device=device) for _ in "qk")
    q_scale = torch.full((1, 2, 8), math.log(2), device=device)
    k_scale = 0.5 + torch.rand(1, 2, 8, device=device) / 2
    v = torch.rand(1, 512, 2, head_dim, device=device).mul(2).sub(1).to(E4M3)
    q8, k8 = (FP8Tensor(x.to(DTYPES[to]), s) for x, s in ((q, q_scale), (k, k_scale)))
    v8 = FP8Tensor(v, torch.ones(1, 2, 1, device=device), 512)
    out, lse = flash_attn_fp8_func(q8, k8, v8, 1.0, window_size=window_size, return_lse=True)
    q, k, v = (x.dequantize().double().transpose(1, 2) for x in (q8, k8, v8))
    at = torch.arange(512, device=device)
    seen = (at[:, None] - at).abs() <= (window_size[0] if window_size[0] >= 0 else 512)
    scores = (q @ k.mT).masked_fill(~seen, -math.inf)
    exact = (scores.softmax(-1) @ v).transpose(1, 2)
    assert (out.double() - exact).abs().max() < 0.05
    assert (out.double() - exact).abs().mean() < 0.01
    assert (lse - scores.logsumexp(-1)).abs().max() < 2e-3


@pytest.mark.parametrize("order", ["expanded", "blocks first"])
def test_any_strides_of_scales(device, order):
    q8, k8 = (
        quantize_fp8(x, dtype=torch.int8)
        for x in random_qkv(device, torch.bfloat16, 2, 200, 300, 2)[:2]
    )
    v8 = quantize_fp8(random_qkv(device, torch.bfloat16, 2, 1, 300, 2)[2], block=None)

    def other(x):
        scale = x.scale.transpose(0, -1).contiguous().transpose(0, -1)
        if order == "expanded":
            scale = x.scale[..., :1].expand(x.scale.shape)
        return dataclasses.replace(x, scale=scale)

    others = [other(x) for x in (q8, k8, v8)]
    dense = [dataclasses.replace(x, scale=x.scale.contiguous()) for x in others]
    assert not any(x.scale.is_contiguous() for x in others)
    assert torch.equal(flash_attn_fp8_func(*others), flash_attn_fp8_func(*dense))


@pytest.mark.parametrize("descale", [0.0, 1e-40, 1e-30])
def test_tiny_descales(device, descale):
    q, k, v = (x.to(E4M3) for x in random_qkv(device, torch.float32, 1, 100, 100, 2))
    tiny = torch.full((1, 2), descale, device=device)
    for names in (("q",), ("k",), ("q", "k")):
        descales = {f"{name}_descale": tiny for name in names}
        out = flash_attn_func(q, k, v, causal=True, **descales)
        exact = mean_of_visible(v.float(), True)
        assert (out - exact).norm() < 0.05 * exact.norm()
    assert not flash_attn_func(q, k, v, v_descale=torch.zeros_like(tiny)).any()


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("channels", ["one", "all"])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("size", [300, 3000, 30000])
@pytest.mark.parametrize(
    "keys", [[401], [448], [1023], [449, 500, 900], list(range(400, 1024, 9))], ids=str
)
def test_outliers_do_not_reach_rows_before_them(device, keys, size, which, channels, to):
    """Sampled or not: every fourth key of 1024 is."""
    head_dim = 64 if channels == "all" else 128
    q, k, v = random_qkv(device, torch.bfloat16, 1, 1024, 1024, 1, head_dim=head_dim)
    for key in keys:
        {"k": k, "v": v}[which][0, key, 0, slice(None) if channels == "all" else 3] = size
    first = keys[0] // 64 * 64
    out = flash_attn_fp8_func(q, k, v, causal=True, qk_dtype=DTYPES[to])[:, :first]
    exact = plain_attention(q, k, v, head_dim**-0.5, True, torch.float64)[0][:, :first]
    assert (out - exact).norm() < 0.08 * exact.norm()


def test_what_most_keys_have_in_common(device):
    """A channel's constant is taken away to the deviation of a few rows' mean, outliers or not."""
    k = random_qkv(device, torch.bfloat16, 1, 1, 1000, 2, head_dim=128)[1]
    k[..., 5] += 20
    for keys in ([], [3], range(0, 1000, 12)):
        k[0, list(keys), 0] = 3e4
        shift = quantize_fp8(k, smooth=True).shift
        wanted = torch.zeros_like(shift)
        wanted[..., 5] = 20
        assert (shift - wanted).abs().max() < 0.7


@pytest.mark.parametrize("seqlen", [1, 2, 5, 31, 33, 64, 300, 600, 1000])
def test_few_keys_have_a_center_too(device, seqlen):
    k = torch.full((2, seqlen, 3, 64), 7.0, device=device, dtype=torch.bfloat16)
    k8 = quantize_fp8(k, smooth=True)
    assert (k8.shift == 7).all()
    assert (k8.dequantize() == 7).all()


@pytest.mark.parametrize("to", DTYPES)
def test_nan_of_a_key_that_is_not_seen(device, to):
    """In K, from the next block of 64 keys on."""
    q, k, v = random_qkv(device, torch.bfloat16, 1, 300, 300, 2)
    k[0, 200] = 0  # not what its block's scale is made of
    wanted = flash_attn_fp8_func(q, k, v, causal=True, smooth_k=False, qk_dtype=DTYPES[to])
    k[0, 200] = math.nan
    out = flash_attn_fp8_func(q, k, v, causal=True, smooth_k=False, qk_dtype=DTYPES[to])
    assert torch.equal(out[:, :192], wanted[:, :192])
    assert out[:, 200:].isnan().all()
    if to == "e4m3" and device == "cpu":
        assert torch.equal(out[:, :200], wanted[:, :200])
    elif to == "e4m3":  # rows that do see it move the origins of their warp
        torch.testing.assert_close(out[:, :200], wanted[:, :200], rtol=0.06, atol=0.02)


@pytest.mark.parametrize(
    "sizes",
    [
        {"seqlen_k": 0},
        {"seqlen_q": 0},
        {"batch": 0},
        {"heads": 0},
        {"heads": 0, "key_heads": 2},
        {"seqlen_q": 0, "seqlen_k": 0},
    ],
    ids=str,
)
def test_sizes_of_zero(device, sizes):
    q, k, v = random_qkv(device, torch.bfloat16, **{"heads": 4, "key_heads": None} | sizes)
    e4m3 = [x.to(E4M3) for x in (q, k, v)]
    descale = torch.ones(k.shape[0], k.shape[2], device=device)
    results = [
        flash_attn_fp8_func(q, k, v, return_lse=True),
        flash_attn_func(*e4m3, return_lse=True),
        flash_attn_func(*e4m3, v_descale=descale, return_lse=True),
    ]
    for out, lse in results:
        assert out.shape == q.shape and out.dtype == torch.bfloat16
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
        assert not out.any() and (lse == -math.inf).all()


def test_lse_of_a_shift_in_chunks(device, monkeypatch):
    """As if all were in float32 at once; from rows and from quantised ones."""
    q, k, v = random_qkv(device, torch.bfloat16, 2, 100, 130, 4, 2)
    k = k + 5
    exact_lse = plain_attention(q, k, v, 0.125, False, torch.float64)[1]
    q8 = quantize_fp8(q, incoherent=True, dtype=torch.int8, seed=9)
    results = []
    for chunk in (1 << 23, 1000):
        monkeypatch.setattr("cute_kernels.fp8.reference._CHUNK", chunk)
        results.append(flash_attn_fp8_func(q, k, v, return_lse=True)[1])
        results.append(flash_attn_fp8_func(q8, k, v, return_lse=True)[1])
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert (results[0] - exact_lse).abs().max() < 0.05
    assert (results[1] - exact_lse).abs().max() < 0.6  # of a sum of 64 products with 5


def form(x):
    return x.shape, x.stride(), x.dtype, x.device


def forward_mode(x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        flash_attn_fp8_func(x, dual, x)


def quantised_in_forward_mode(x):
    torch.func.jvp(quantize_fp8, (x,), (x,))


def e4m3_in_vmap(x):
    torch.vmap(flash_attn_func)(*(3 * [x.to(E4M3).unsqueeze(0)]))


@pytest.mark.parametrize(
    "call",
    [
        forward_mode,
        quantised_in_forward_mode,
        e4m3_in_vmap,
        lambda x: torch.func.jvp(lambda y: flash_attn_fp8_func(y, y, y), (x,), (x,)),
        lambda x: torch.func.grad(lambda y: flash_attn_fp8_func(y, y, y).sum())(x),
        lambda x: torch.vmap(lambda y: flash_attn_fp8_func(y, y, y))(x.unsqueeze(0)),
        lambda x: quantize_fp8(x.clone().requires_grad_()),
    ],
)
def test_derivatives_are_refused(device, call):
    with pytest.raises(NotImplementedError, match=r"in FP8|no forward-mode derivatives"):
        call(torch.randn(1, 8, 2, 64, device=device, dtype=torch.bfloat16))


def quantised(q, k, v):
    options = {"incoherent": True, "dtype": torch.int8}
    return quantize_fp8(q, **options), quantize_fp8(k, **options), quantize_fp8(v, block=None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, v: flash_attn_fp8_func([q], k, v), TypeError, "q is a list"),
        (lambda q, k, v: flash_attn_fp8_func(q, None, v), TypeError, "k is a NoneType"),
        (lambda q, k, v: quantize_fp8(quantize_fp8(q)), TypeError, "x is a FP8Tensor"),
        (lambda q, k, v: flash_attn_fp8_func(q, k, v, causal="no"), TypeError, "causal is 'no'"),
        (lambda q, k, v: flash_attn_fp8_func(q[0], k, v), ValueError, r"q has shape \(100,"),
        (lambda q, k, v: flash_attn_fp8_func(q, k[:1], v), ValueError, "k has batch 1"),
        (lambda q, k, v: flash_attn_fp8_func(q, k, v[:, :9]), ValueError, "v has seqlen"),
        (lambda q, k, v: flash_attn_fp8_func(q[:, :, :3], k, v), ValueError, "q has 3 heads"),
        (lambda q, k, v: flash_attn_fp8_func(q, k, v, math.inf), ValueError, "softmax_scale is"),
        (lambda q, k, v: flash_attn_fp8_func(q, k, v, 0.0), ValueError, "softmax_scale is"),
        (
            lambda q, k, v: flash_attn_fp8_func(q, k, v, 1e39),
            ValueError,
            r"softmax_scale is 1e\+39, must be at most 3\.4",
        ),
        (lambda q, k, v: flash_attn_fp8_func(q, k, v, seed=2**64), ValueError, "seed is"),
        (
            lambda q, k, v: flash_attn_fp8_func(q, k, v, tile_config="none"),
            ValueError,
            r"tile_config is 'none', must be None \(automatic\) or the name of a forward_fp8 row",
        ),
        (
            lambda q, k, v: flash_attn_fp8_func(q, k, v, tile_config=1),
            TypeError,
            "tile_config is 1, must be None",
        ),
        (lambda q, k, v: flash_attn_fp8_func(q, k, v.int()), TypeError, "v has dtype torch.int32"),
        (lambda q, k, v: flash_attn_fp8_func(q.int(), k, v), TypeError, "q has dtype torch.int32"),
        (
            lambda q, k, v: flash_attn_fp8_func(q, k, v, incoherent="no"),
            TypeError,
            "incoherent is 'no', must be True or False",
        ),
        (
            lambda q, k, v: flash_attn_fp8_func(q, k, v, smooth_k=torch.ones(2)),
            TypeError,
            "smooth_k is tensor",
        ),
        (
            lambda q, k, v: flash_attn_fp8_func(q, k, v, qk_dtype="int8"),
            TypeError,
            "qk_dtype is 'int8', must be torch.float8_e4m3fn or torch.int8",
        ),
        (lambda q, k, v: quantize_fp8(q, seed=1.5), TypeError, "seed is 1.5, must be an int"),
        (lambda q, k, v: quantize_fp8(q, block="64"), TypeError, "block is '64', must be an int"),
        (
            lambda q, k, v: flash_attn_fp8_func(q, k, v, out_dtype=torch.int8),
            TypeError,
            "out_dtype is torch.int8",
        ),
        (
            lambda q, k, v: flash_attn_func(
                *(x.to(E4M3).mT.contiguous().mT for x in (q, k)), v.to(E4M3)
            ),
            ValueError,
            "q has strides",
        ),
        (
            lambda q, k, v: flash_attn_func(q[:, :, :3].to(E4M3), k.to(E4M3), v.to(E4M3)),
            ValueError,
            "q has 3 heads, must be a multiple of k's 2",
        ),
        (
            lambda q, k, v: flash_attn_func(
                *(x.to(E4M3) for x in (q, k, v)), v_descale=torch.ones(2, 2, device="meta")
            ),
            ValueError,
            "v_descale is on meta",
        ),
        (
            lambda q, k, v: flash_attn_varlen_func(*[q[0].to(E4M3)] * 3, [0, 100], [0, 100]),
            TypeError,
            "cu_seqlens_q is a list, must be a torch.Tensor",
        ),
        (
            lambda q, k, v: flash_attn_varlen_func(
                *[q[0].to(E4M3)] * 3, *[torch.zeros(0, dtype=torch.int32, device=q.device)] * 2
            ),
            ValueError,
            r"cu_seqlens_q has shape \(0,\), must be \(batch \+ 1,\)",
        ),
        (
            lambda q, k, v: flash_attn_fp8_func(
                FP8Tensor(q.to(E4M3), torch.ones(2, 4, 2, device=q.device).double()), k, v
            ),
            TypeError,
            "q's scale has dtype torch.float64",
        ),
    ],
)
def test_refusals(device, call, error, message):
    """One text and one type of error wherever the tensors are."""
    with pytest.raises(error, match=message):
        call(*random_qkv(device, torch.bfloat16, 2, 100, 100, 4, 2))


def test_any_strides_of_head_dim(device):
    q, k, v = random_qkv(device, torch.bfloat16, 2, 100, 100, 2)
    odd = [x.mT.contiguous().mT for x in (q, k, v)]
    wanted = flash_attn_fp8_func(q, k, v)
    out = flash_attn_fp8_func(*odd)
    assert (out - wanted).abs().max() < 0.05
