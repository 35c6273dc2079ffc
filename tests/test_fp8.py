"""FP8: what quantisation promises, and the CPU path of the FP8 kernel's arithmetic."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from parity import plain_attention, random_qkv

from cute_kernels import flash_attn_func, tile_configs
from cute_kernels.fp8 import (
    ROW_BLOCK,
    SATURATION,
    FP8Tensor,
    flash_attn_fp8_func,
    quantize_fp8,
    random_signs,
    rotate,
    rotate_back,
    uses_linear_exp,
)

HEAD_DIMS = [16, 48, 64, 80, 96, 128, 192, 240, 256]
E4M3 = torch.float8_e4m3fn


def rmse(out, exact):
    return (out.double() - exact).square().mean().sqrt().item()


def same_bits(a, b):
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(
        a.scale, b.scale
    )


def outliers(shape, generator):
    """The paper's distribution: N(0, 1), and one element of a thousand with N(0, 100) added."""
    rare = torch.rand(shape, generator=generator) < 0.001
    return torch.randn(shape, generator=generator) + rare * 10 * torch.randn(
        shape, generator=generator
    )


def test_signs_are_those_of_splitmix64():
    """Numbers that any implementation must meet: the first outputs for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    published += [4593380528125082431, 16408922859458223821]
    assert random_signs(5, 1234567) == [-1 if z >> 63 else 1 for z in published]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthogonal(head_dim):
    m = rotate(torch.eye(head_dim), seed=3)
    torch.testing.assert_close(m @ m.T, torch.eye(head_dim), atol=5e-6, rtol=0)
    x = torch.randn(5, head_dim)
    torch.testing.assert_close(rotate_back(rotate(x, 3), 3), x, atol=5e-6, rtol=0)
    assert m.abs().max() <= max(1.0, 2 * (head_dim & -head_dim) ** -0.5)


@pytest.mark.parametrize("incoherent", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_elements_are_within_half_a_step(dtype, head_dim, incoherent):
    x = torch.randn(2, 150, 3, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = quantize_fp8(x, incoherent=incoherent, seed=5)
    assert got.data.dtype == E4M3 and got.data.is_contiguous() and got.data.shape == x.shape
    assert got.scale.shape == (2, 3, 3) and got.seed == (5 if incoherent else None)
    wanted = rotate(x, 5) if incoherent else x.float()
    value = got.data.float() * got.row_scales()
    largest = got.row_scales() * 448
    assert ((value - wanted).abs() <= wanted.abs() / 16 + largest * 2.0**-18).all()
    # The largest of a block meets e4m3's largest.
    last = got.data[:, 2 * ROW_BLOCK :].float().abs().amax((1, 3))
    assert (last == 448).all()
    assert rmse(got.dequantize(), x.double()) < 0.04


def test_scales_of_channels_and_int8():
    x = torch.randn(2, 100, 2, 64) * torch.logspace(-3, 3, 64)
    v = quantize_fp8(x, block=None)
    assert v.scale.shape == (2, 2, 1, 64)
    assert ((v.dequantize() - x).abs() <= x.abs() / 16 + x.abs().amax(1, True) * 2.0**-11).all()
    exact = rotate(torch.randn(1, 64, 1, 128), 0)
    q = quantize_fp8(exact, dtype=torch.int8)
    assert q.data.dtype == torch.int8
    assert rmse(q.dequantize(), exact.double()) < 0.012


def test_channels_have_headroom_where_the_samples_foretell_them():
    x = torch.randn(1, 1000, 2, 64)
    x[0, 778, 1, 5] = 1e4  # between two samples
    v = quantize_fp8(x, block=None)
    usual, largest = x[:, ::3].abs().log().mean(1).exp(), x.abs().amax(1)
    torch.testing.assert_close(v.scale[0, 0, 0], usual[0, 0] * 512 / 448, rtol=0.1, atol=0)
    torch.testing.assert_close(v.scale[0, 1, 0], largest[0, 1] / 448, rtol=1e-6, atol=0)
    assert (v.dequantize()[0, 778, 1, 5] - 1e4).abs() < 1
    assert (quantize_fp8(x, block=None, dtype=torch.int8).data.abs().amax(1) == 127).all()


def test_seeds():
    x = torch.randn(1, 70, 2, 64)
    a = quantize_fp8(x, incoherent=True, seed=7)
    assert same_bits(a, quantize_fp8(x, incoherent=True, seed=7))
    assert not same_bits(a, quantize_fp8(x, incoherent=True, seed=8))
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 70, 90, 2)
    results = [flash_attn_fp8_func(q, k, v, seed=seed) for seed in (1, 1, 2**64 - 1)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[2], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("incoherent", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1e-40, math.inf, -math.inf, 3e38, math.nan])
def test_every_input_has_a_defined_result(fill, incoherent):
    x = torch.randn(1, 2 * ROW_BLOCK, 1, 64)
    x[:, ROW_BLOCK:] = fill
    got = quantize_fp8(x, incoherent=incoherent)
    assert got.scale.isfinite().all() and (got.scale > 0).all()
    value = got.data.float() * got.row_scales()
    assert value[:, :ROW_BLOCK].isfinite().all()
    tail = value[:, ROW_BLOCK:]
    if math.isnan(fill):
        assert tail.isnan().all()
    elif not incoherent:
        wanted = max(-SATURATION, min(SATURATION, fill))
        torch.testing.assert_close(tail, torch.full_like(tail, wanted), rtol=1e-6, atol=1e-30)
    else:
        assert tail.isfinite().all()


def test_int8_keeps_nan_in_the_scale():
    x = torch.randn(1, 3 * ROW_BLOCK, 1, 64)
    x[0, ROW_BLOCK, 0, 5] = math.nan
    got = quantize_fp8(x, dtype=torch.int8)
    assert got.scale.isnan().tolist() == [[[False, True, False]]]
    assert got.dequantize().isnan().sum() == ROW_BLOCK * 64


def test_attention_of_extreme_inputs():
    q, k, v = random_qkv("cpu", torch.float32, 1, 70, 130, 1)
    q[0, 5], k[0, 100, 0, 3] = math.inf, -math.inf
    out, lse = flash_attn_fp8_func(q, k, v, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    q[0, 7, 0, 0] = math.nan  # NaN stays in its row, or in its block where int8 has none
    out = flash_attn_fp8_func(q, k, v, qk_dtype=E4M3)
    assert out[0, 7].isnan().all() and out.isnan().sum() == out[0, 7].numel()
    out = flash_attn_fp8_func(q, k, v, qk_dtype=torch.int8)
    assert out[:, :ROW_BLOCK].isnan().all() and out[:, ROW_BLOCK:].isfinite().all()
    zeros = torch.zeros_like(k)
    out, lse = flash_attn_fp8_func(q[:, 8:], zeros, v, return_lse=True)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(130)))
    torch.testing.assert_close(out[0, 0], v.mean(1)[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 700), (113, 203), (300, 3), (257, 513)], ids=str)
def test_attention(seqlens, heads, causal):
    for head_dim in (64, 96, 256):
        q, k, v = random_qkv("cpu", torch.bfloat16, 2, *seqlens, *heads, head_dim=head_dim)
        exact, exact_lse = plain_attention(q, k, v, head_dim**-0.5, causal, torch.float64)
        for incoherent in (False, True):
            out, lse = flash_attn_fp8_func(
                q, k, v, causal=causal, incoherent=incoherent, return_lse=True
            )
            assert out.dtype == q.dtype and out.shape == q.shape and lse.dtype == torch.float32
            # 5% of the output's size: e4m3 rounds by 2.6%, four times over.
            assert rmse(out, exact) <= 0.06 * exact.square().mean().sqrt().item() + 1e-6
            unseen = exact_lse == -math.inf
            assert torch.equal(lse == -math.inf, unseen)
            assert (lse - exact_lse).masked_fill(unseen, 0).abs().max() < 0.3
            assert not out.transpose(1, 2)[unseen].any()


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_quantised_exactly_means_exact_scores(head_dim):
    """Inputs that e4m3 holds: only P is rounded, and not in the LSE."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randint(-4, 5, (1, 200, 2, head_dim), generator=generator).float() for _ in range(3)
    )
    q8, k8 = (FP8Tensor(x.to(E4M3), torch.full((1, 2, 4), 0.5)) for x in (q, k))
    v8 = FP8Tensor(v.to(E4M3), torch.full((1, 2, 1, head_dim), 2.0), block=None)
    out, lse = flash_attn_fp8_func(
        q8, k8, v8, causal=True, out_dtype=torch.float32, return_lse=True
    )
    scale = head_dim**-0.5
    exact, exact_lse = plain_attention(q / 2, k / 2, v * 2, scale, True, torch.float64)
    assert (lse - exact_lse).abs().max() < 1e-5
    assert rmse(out, exact) < 0.03 * exact.square().mean().sqrt().item()


def test_descales_of_a_whole_head():
    """FlashAttention-3's form: one number for a head is one block of all rows."""
    q, k, v = random_qkv("cpu", torch.float32, 2, 100, 100, 2)
    q8, k8, v8 = (x.to(E4M3) for x in (q, k, v))
    one, scale = torch.ones(2, 2, 1), torch.rand(2, 2, 1) + 0.5
    plain = flash_attn_fp8_func(*(FP8Tensor(x, one, 100) for x in (q8, k8, v8)), 0.1)
    scaled = FP8Tensor(v8, 4 * one, 100)
    out = flash_attn_fp8_func(FP8Tensor(q8, one / 4, 100), FP8Tensor(k8, 4 * one, 100), scaled, 0.1)
    torch.testing.assert_close(out, 4 * plain)
    out = flash_attn_fp8_func(FP8Tensor(q8, scale, 100), FP8Tensor(k8, one, 100), scaled, 0.1)
    scales = scale.transpose(1, 2)[..., None]
    exact, _ = plain_attention(q8.float() * scales, k8, 4 * v8.float(), 0.1, False, torch.float64)
    assert rmse(out, exact) < 0.04 * exact.square().mean().sqrt().item()


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_func_takes_e4m3(causal):
    """FlashAttention-3's call: descales of key heads, bfloat16 out."""
    q, k, v = (x.to(E4M3) for x in random_qkv("cpu", torch.float32, 2, 70, 100, 4, 2, 48))
    descales = {f"{name}_descale": torch.rand(2, 2) + 0.5 for name in "qkv"}
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True, **descales)
    assert out.dtype == torch.bfloat16 and out.shape == q.shape
    wide = {
        name: scale.repeat_interleave(x.shape[2] // 2, 1)[:, None, :, None]
        for (name, scale), x in zip(descales.items(), (q, k, v), strict=True)
    }
    inputs = (x.float() * scale for x, scale in zip((q, k, v), wide.values(), strict=True))
    exact, exact_lse = plain_attention(*inputs, 48**-0.5, causal, torch.float64)
    assert rmse(out, exact) < 0.04 * exact.square().mean().sqrt().item()
    assert (lse - exact_lse).abs().max() < 0.04
    ones = {name: torch.ones(2, 2) for name in descales}
    assert torch.equal(flash_attn_func(q, k, v), flash_attn_func(q, k, v, **ones))
    only_v = flash_attn_func(q, k, v, v_descale=torch.full((2, 2), 4.0))
    assert torch.equal(only_v, 4 * flash_attn_func(q, k, v))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_descale": torch.ones(2)}, ValueError, r"q_descale has shape \(2,\), must be"),
        ({"k_descale": torch.ones(2, 4)}, ValueError, "k_descale has shape"),
        ({"v_descale": torch.ones(2, 2).double()}, TypeError, "v_descale has dtype"),
        ({"q": torch.ones(2, 8, 4, 64)}, TypeError, "q has dtype torch.float32, must be"),
        ({"k": torch.ones(2, 8, 2, 64)}, TypeError, "k has dtype torch.float32, must be"),
        ({"v": torch.ones(2, 8, 64).to(E4M3)}, ValueError, "v has shape"),
        ({"v": torch.ones(2, 9, 2, 64).to(E4M3)}, ValueError, "v has seqlen"),
        ({"tile_config": 0}, ValueError, "tile_config is 0"),
        ({"softmax_scale": math.inf}, ValueError, "softmax_scale is inf"),
        ({"softcap": 30.0}, NotImplementedError, "softcap"),
    ],
    ids=str,
)
def test_refusals_of_e4m3(change, error, message):
    q, k = torch.ones(2, 8, 4, 64).to(E4M3), torch.ones(2, 8, 2, 64).to(E4M3)
    arguments = {"q": q, "k": k, "v": k, "q_descale": torch.ones(2, 2)} | change
    with pytest.raises(error, match=message):
        flash_attn_func(**arguments)


def test_no_gradient():
    x = torch.randn(1, 8, 2, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient in FP8"):
        flash_attn_fp8_func(x, x, x)
    with torch.no_grad():
        assert not flash_attn_fp8_func(x, x, x).requires_grad


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiles_whole():
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 70, 90, 2)
    e4m3 = [x.to(E4M3) for x in (q, k, v)]
    for function, inputs in ((flash_attn_fp8_func, (q, k, v)), (flash_attn_func, e4m3)):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_incoherent_processing_survives_outliers(head_dim):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (outliers((1, 1024, 2, head_dim), generator) for _ in range(3))
    exact, _ = plain_attention(q, k, v, head_dim**-0.5, False, torch.float64)
    error = {
        name: rmse(flash_attn_fp8_func(q, k, v, **options), exact)
        for name, options in {
            "blocks": {"incoherent": False, "qk_dtype": E4M3},
            "incoherent": {"qk_dtype": E4M3},
            "int8": {},
        }.items()
    }
    assert error["incoherent"] < 0.75 * error["blocks"]
    assert error["int8"] < 0.8 * error["incoherent"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quantize_fp8(x[0]), ValueError, "x has shape"),
        (lambda x: quantize_fp8(x.int()), TypeError, "x has dtype"),
        (lambda x: quantize_fp8(x[..., :40]), ValueError, "x has head_dim 40"),
        (lambda x: quantize_fp8(x, block=0), ValueError, "block is 0"),
        (lambda x: quantize_fp8(x, seed=-1), ValueError, "seed is -1"),
        (lambda x: quantize_fp8(x, dtype=torch.uint8), TypeError, "dtype is"),
        (lambda x: flash_attn_fp8_func(x, x[:1], x), ValueError, "k has batch 1"),
        (lambda x: flash_attn_fp8_func(x, x, x[:, :5]), ValueError, "v has seqlen"),
        (lambda x: flash_attn_fp8_func(x[:, :, :1], x, x), ValueError, "q has 1 heads"),
        (lambda x: flash_attn_fp8_func(x, x, x, 0.0), ValueError, "softmax_scale is 0"),
        (lambda x: flash_attn_fp8_func(x, x[..., :16], x), ValueError, "k has head_dim 16"),
        (
            lambda x: flash_attn_fp8_func(
                quantize_fp8(x, incoherent=True), quantize_fp8(x, incoherent=True, seed=1), x
            ),
            ValueError,
            "k has seed 1",
        ),
        (
            lambda x: flash_attn_fp8_func(x, quantize_fp8(x, block=None), x),
            ValueError,
            "q and k need scales of row blocks",
        ),
        (
            lambda x: flash_attn_fp8_func(x, x, FP8Tensor(x.to(E4M3), torch.ones(2, 2))),
            ValueError,
            "v's scale has shape",
        ),
        (lambda x: flash_attn_fp8_func(x, x, quantize_fp8(x)), ValueError, "v needs one scale"),
        (
            lambda x: flash_attn_fp8_func(quantize_fp8(x, smooth=True), x, x),
            ValueError,
            "q has a shift",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 100, 2, 64))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_smoothing_takes_constant_channels_away(heads):
    q, k, v = random_qkv("cpu", torch.float32, 2, 300, 700, *heads)
    k[..., 7] += 50
    k[..., 40] -= 80
    exact, exact_lse = plain_attention(q, k, v, 0.125, True, torch.float64)
    rough = rmse(flash_attn_fp8_func(q, k, v, causal=True, smooth_k=False, qk_dtype=E4M3), exact)
    out, lse = flash_attn_fp8_func(q, k, v, causal=True, qk_dtype=E4M3, return_lse=True)
    assert rmse(out, exact) < 0.25 * rough
    assert (lse - exact_lse).abs().max() < 0.3
    k8 = quantize_fp8(k, smooth=True)
    assert rmse(k8.dequantize(), k.double()) < 0.04
    q8 = quantize_fp8(q)
    out, lse = flash_attn_fp8_func(q8, k8, v, causal=True, return_lse=True)
    assert rmse(out, exact) < 0.25 * rough


def test_strides():
    x = torch.randn(2, 3, 100, 64).transpose(1, 2)
    for options in ({}, {"incoherent": True}, {"block": None}):
        assert same_bits(quantize_fp8(x, **options), quantize_fp8(x.contiguous(), **options))


def test_empty():
    q, k, v = random_qkv("cpu", torch.bfloat16, 2, 0, 5, 2)
    assert flash_attn_fp8_func(q, k, v).shape == q.shape
    out, lse = flash_attn_fp8_func(k, q, q, return_lse=True)
    assert not out.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_whose_exponentials_the_cpu_has(dtype):
    """Of the rows with the smallest head dims that fit, the last one."""
    name = "int8" if dtype == torch.int8 else "e4m3"
    rows = [row for row in tile_configs("forward_fp8") if row["dtype"] == name]
    rows = [row for row in rows if row["mask"] != "none"]
    for head_dim in range(16, 273, 16):
        for head_dim_v in (None, *range(16, 273, 16)):
            least = (head_dim, head_dim_v or head_dim)
            sizes = [(row["head_dim"], row["head_dim_v"]) for row in rows]
            fitting = [sum(x) for x in sizes if x[0] >= least[0] and x[1] >= least[1]]
            chosen = [
                row["linear_exp"]
                for row, x in zip(rows, sizes, strict=True)
                if x[0] >= least[0] and x[1] >= least[1] and sum(x) == min(fitting)
            ]
            assert uses_linear_exp(dtype, head_dim, head_dim_v) == bool(chosen and chosen[-1])


def test_error_study(tmp_path, capsys):
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed
    from bench import fp8_error

    small = ["--seqlen", "96", "--heads", "1", "--repeats", "1", "--head-dims", "64"]
    assert fp8_error.main([*small, "--out", str(tmp_path / "study.json")]) == 0
    data = json.loads((tmp_path / "study.json").read_text("utf-8"))
    assert [cell["inputs"] for cell in data["cells"]] == list(fp8_error.INPUTS)
    rmse = {cell["inputs"]: cell["rmse"] for cell in data["cells"]}
    assert rmse["channels"]["both_smooth"] < 0.5 * rmse["channels"]["both"]
    assert all(values["fp16"] < values["int8"] for values in rmse.values())
    assert capsys.readouterr().out.startswith("| RMSE |")
