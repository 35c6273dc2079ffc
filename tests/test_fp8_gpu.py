"""FP8 on the GPU: quantisation in the CPU's bits, attention against fp64. Skipped without one."""

import math

import pytest
import torch
from parity import plain_attention, poison, random_qkv

from cute_kernels import flash_attn_func, tile_configs
from cute_kernels.fp8 import (
    GPU_BUILT,
    FP8Tensor,
    flash_attn_fp8_func,
    quantize_fp8,
    uses_linear_exp,
)
from cute_kernels.fp8.kernels import attention_cuda, whole_attention_cuda

pytestmark = pytest.mark.skipif(not GPU_BUILT, reason="built without CUTE_KERNELS_FP8")

E4M3 = torch.float8_e4m3fn
HEAD_DIMS = [64, 128, 256]
DTYPES = {"e4m3": E4M3, "int8": torch.int8}
INPUTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The tensor cores add 8-bit products in about 14 bits: of the largest score.
LSE_TOLERANCE = {"e4m3": 1e-3, "int8": 1e-4}
SEED = 2**63 + 12345


def has_exact_lse(to, head_dim):
    """Builds may hold only some rows."""
    rows = [
        row
        for row in tile_configs("forward_fp8")
        if row["dtype"] == to and row["head_dim"] >= head_dim and row["any_call"]
    ]
    return bool(rows) or not uses_linear_exp(DTYPES[to], head_dim)


def to_cpu(x):
    moved = (None if t is None else t.cpu() for t in (x.data, x.scale, x.shift))
    data, scale, shift = moved
    return FP8Tensor(data, scale, x.block, x.seed, shift, x.keys)


def assert_same_bits(gpu, cpu):
    gpu = to_cpu(gpu)
    assert torch.equal(gpu.scale.nan_to_num(-1.0), cpu.scale.nan_to_num(-1.0))
    a, b = gpu.rows(), cpu.rows()
    nan = b.float().isnan()  # any NaN is as good as another
    assert torch.equal(a.float().isnan(), nan)
    assert torch.equal(a.float().masked_fill(nan, 0), b.float().masked_fill(nan, 0))


def rough_inputs(dtype, head_dim, kind):
    x = torch.randn(2, 203, 3, head_dim, generator=torch.Generator().manual_seed(head_dim))
    if kind == "extreme":
        x[0, 5, 0, 3], x[0, 70, 1, 0], x[0, 200, 2, 1] = math.inf, math.nan, -math.inf
        x[1, 64:128] = 0
        x[1, 128:140] *= 1e-6
        x[1, 0] *= 1e4
    return x.to(dtype)


@pytest.mark.parametrize("kind", ["normal", "extreme"])
@pytest.mark.parametrize("incoherent", [False, True])
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_in_the_bits_of_the_cpu(hopper, head_dim, dtype, to, incoherent, kind):
    x = rough_inputs(INPUTS[dtype], head_dim, kind)
    options = {"incoherent": incoherent, "seed": SEED, "dtype": DTYPES[to]}
    assert_same_bits(quantize_fp8(x.to(hopper), **options), quantize_fp8(x, **options))


@pytest.mark.parametrize("kind", ["normal", "extreme"])
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
def test_values_in_the_bits_of_the_cpu(hopper, head_dim, dtype, kind):
    x = rough_inputs(INPUTS[dtype], head_dim, kind)
    got = quantize_fp8(x.to(hopper), block=None)
    assert got.shape == x.shape and got.data.shape == (2, 3, head_dim, 208)
    assert_same_bits(got, quantize_fp8(x, block=None))


@pytest.mark.parametrize("head_dim", [32, 96, 192])
def test_other_head_dims_in_the_arithmetic_of_the_cpu(hopper, head_dim):
    x = rough_inputs(torch.bfloat16, head_dim, "normal")
    got = to_cpu(quantize_fp8(x.to(hopper), incoherent=True))
    wanted = quantize_fp8(x, incoherent=True)
    difference = got.dequantize() - wanted.dequantize()
    assert difference.square().mean().sqrt() < 1e-3


def test_any_strides_and_offsets(hopper):
    base = torch.randn(2 * 3 * 100 * 64 + 1, device=hopper, dtype=torch.bfloat16)
    odd = base[1:].view(2, 100, 3, 64)
    turned = base[:-1].view(2, 3, 100, 64).transpose(1, 2)
    expanded = base[:19200].view(1, 100, 3, 64).expand(2, -1, -1, -1)
    for x in (odd, turned, expanded):
        for options in ({}, {"incoherent": True}, {"block": None}):
            assert_same_bits(quantize_fp8(x, **options), quantize_fp8(x.cpu(), **options))


def test_the_mean_of_keys(hopper):
    k = torch.randn(2, 1500, 3, 128, device=hopper, dtype=torch.bfloat16) + 7
    got, wanted = quantize_fp8(k, smooth=True), quantize_fp8(k.cpu(), smooth=True)
    assert torch.equal(got.shift.cpu(), wanted.shift)
    assert_same_bits(got, wanted)  # the last block has 28 rows: what is no row must not count
    error = got.dequantize().cpu() - k.float().cpu()
    assert error.square().mean().sqrt() < 0.04


@pytest.mark.parametrize("kind", ["normal", "extreme"])
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("seqlen", [1, 2, 31, 33, 203, 255, 256, 511, 512, 5000])
def test_samples_in_the_bits_of_the_cpu(hopper, seqlen, dtype, kind):
    """The center of keys and the range of values, with outliers, zeros and whole channels of them;
    head dim 80 has no fused kernel for rows."""
    for head_dim in (64, 80, 256):
        x = torch.randn(2, seqlen, 3, head_dim, generator=torch.Generator().manual_seed(seqlen))
        if kind == "extreme":
            x[0, ::7, :, 1] *= 1e4
            x[0, :, 1, 2:9] = 0
            x[1, : seqlen // 2] = 0
            x[1, seqlen // 3, 0, 3], x[1, -1, 0, 4], x[0, 0, 2] = math.nan, math.inf, 3e4
            x[..., 10] *= 1e-6
        x = x.to(INPUTS[dtype])
        got, wanted = quantize_fp8(x.to(hopper), smooth=True), quantize_fp8(x, smooth=True)
        assert torch.equal(got.shift.cpu(), wanted.shift)
        assert_same_bits(quantize_fp8(x.to(hopper), block=None), quantize_fp8(x, block=None))


@pytest.mark.parametrize("what", [1e4, math.inf, math.nan])
@pytest.mark.parametrize("dtype", INPUTS)
def test_values_that_the_samples_did_not_foretell(hopper, dtype, what):
    v = torch.randn(2, 1500, 3, 128, device=hopper, dtype=INPUTS[dtype])
    v[0, 1401, 1, 77] = what  # between two samples
    got, wanted = quantize_fp8(v, block=None), quantize_fp8(v.cpu(), block=None)
    assert_same_bits(got, wanted)
    rest = torch.cat([got.scale[1], got.scale[0, [0, 2]]])
    assert rest.min() > 8 * got.scale[0, 1].median()  # where there is headroom


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_whole_call_as_one_by_one(hopper, head_dim, to, dtype, smooth):
    """One call whose kernels overlap: what one of them writes and another reads must be there."""
    options = {"incoherent": True, "seed": SEED, "dtype": DTYPES[to]}
    for seqlen_q, seqlen_k in ((203, 1000), (4096, 4096), (1, 9000), (700, 300)):
        q, k, v = random_qkv(hopper, INPUTS[dtype], 2, seqlen_q, seqlen_k, 4, 2, head_dim)
        k = k + 3
        v[0, seqlen_k - 2, 0, 1] = 1e4  # quantised again
        q8, v8 = quantize_fp8(q, **options), quantize_fp8(v, block=None)
        k8 = quantize_fp8(k, smooth=smooth, **options)
        wanted = attention_cuda(q8, k8, v8, head_dim**-0.5, True, INPUTS[dtype])
        for _ in range(5):
            out, lse, shift = whole_attention_cuda(
                *(q, k, v, head_dim**-0.5, True, smooth, True, SEED, DTYPES[to], INPUTS[dtype])
            )
            assert torch.equal(out, wanted[0])
            assert torch.equal(lse, wanted[1])
            assert torch.equal(shift, k8.shift) if smooth else shift is None


@pytest.mark.parametrize("incoherent", [False, True])
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rough_queries_of_any_strides_as_one_by_one(hopper, head_dim, to, dtype, incoherent):
    options = {"incoherent": incoherent, "seed": SEED, "dtype": DTYPES[to]}
    rough = rough_inputs(INPUTS[dtype], head_dim, "extreme").to(hopper)
    wide = torch.empty(2, 3, 203, head_dim + 24, device=hopper, dtype=rough.dtype)
    q = wide[..., 8:-16].transpose(1, 2).copy_(rough)
    odd = torch.empty(2, 203, 3, head_dim + 1, device=hopper, dtype=rough.dtype)
    _, k, v = random_qkv(hopper, rough.dtype, 2, 1, 321, 3, 1, head_dim)
    q8, k8, v8 = (
        quantize_fp8(rough, **options),
        quantize_fp8(k, **options),
        quantize_fp8(v, block=None),
    )
    wanted = attention_cuda(q8, k8, v8, 0.1, False, rough.dtype)
    for queries in (q, odd[..., 1:].copy_(rough)):
        out, lse, _ = whole_attention_cuda(
            *(queries, k, v, 0.1, False, False, incoherent, SEED, DTYPES[to], rough.dtype)
        )
        assert torch.equal(out.isnan(), wanted[0].isnan())
        assert torch.equal(out.nan_to_num(), wanted[0].nan_to_num())
        assert torch.equal(lse.nan_to_num(), wanted[1].nan_to_num())
        assert out.isnan().any() and out.isfinite().any()


def quantised(q, k, v, to):
    options = {"incoherent": True, "seed": SEED, "dtype": DTYPES[to]}
    return (
        quantize_fp8(q, **options),
        quantize_fp8(k, **options),
        quantize_fp8(v, block=None),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 48, 112, 240])
def test_attention(hopper, head_dim, to, causal):
    """Only P is rounded between the quantised inputs and the result."""
    shapes = [(1, 1, 2, 2), (1, 1000, 4, 2), (113, 203, 4, 1), (799, 3, 2, 2), (1023, 1024, 3, 3)]
    for seqlen_q, seqlen_k, heads, key_heads in shapes:
        for dtype in INPUTS.values():
            q, k, v = random_qkv(
                hopper, dtype, 2, seqlen_q, seqlen_k, heads, key_heads, head_dim, seed=seqlen_k
            )
            # Blocks of very different sizes, so that a scale of another block shows.
            q = q * torch.exp2(torch.arange(seqlen_q, device=hopper) // 64 % 3 - 1)[:, None, None]
            k = k * torch.exp2(torch.arange(seqlen_k, device=hopper) // 64 % 5 - 2)[:, None, None]
            q, k = q.to(dtype), k.to(dtype)
            q8, k8, v8 = quantised(q, k, v, to)
            poison(q, v)
            out, lse = flash_attn_fp8_func(
                q8, k8, v8, causal=causal, out_dtype=dtype, return_lse=True
            )
            assert out.dtype == dtype and out.is_contiguous() and out.shape == q.shape
            exact, exact_lse = plain_attention(
                q8.data.float() * q8.row_scales(),
                k8.data.float() * k8.row_scales(),
                v8.dequantize(),
                head_dim**-0.5,
                causal,
                torch.float64,
            )
            error = (out.double() - exact).square().mean().sqrt()
            assert error <= 0.05 * exact.square().mean().sqrt() + 1e-6
            unseen = exact_lse == -math.inf
            assert torch.equal(lse == -math.inf, unseen)
            assert not out.transpose(1, 2)[unseen].any()
            size = exact_lse.masked_fill(unseen, 0).abs().max().clamp_min(1.0)
            lse_error = (lse - exact_lse).masked_fill(unseen, 0).abs().max()
            of_p = 0.0 if has_exact_lse(to, head_dim) else 0.1  # row sums are of rounded P
            assert lse_error <= LSE_TOLERANCE[to] * size + of_p


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_from_bf16_as_on_the_cpu(hopper, head_dim):
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 300, 500, 4, 2, head_dim)
    k[..., 3] += 40
    for qk_dtype in DTYPES.values():
        wanted, wanted_lse = flash_attn_fp8_func(q, k, v, qk_dtype=qk_dtype, return_lse=True)
        inputs = (x.to(hopper) for x in (q, k, v))
        out, lse = flash_attn_fp8_func(*inputs, qk_dtype=qk_dtype, return_lse=True)
        size = wanted.float().square().mean().sqrt()
        assert (out.cpu().float() - wanted.float()).square().mean().sqrt() < 0.05 * size
        assert (lse.cpu() - wanted_lse).abs().max() < 0.05


def test_values_that_come_in_e4m3(hopper):
    """An ordinary e4m3 v with one scale a head, as FlashAttention-3 takes it."""
    q, k, v = random_qkv(hopper, torch.float32, 2, 100, 170, 2)
    q8, k8, v8 = (x.to(E4M3) for x in (q, k, v))
    scale = torch.rand(2, 2, 1, device=hopper) + 0.5
    parts = [FP8Tensor(x, scale, x.shape[1]) for x in (q8, k8, v8)]
    out = flash_attn_fp8_func(*parts)
    wide = scale.transpose(1, 2)[..., None]
    exact, _ = plain_attention(
        q8.float() * wide, k8.float() * wide, v8.float() * wide, 0.125, False, torch.float64
    )
    assert (out.double() - exact).square().mean().sqrt() < 0.035 * exact.square().mean().sqrt()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 112, 256])
def test_flash_attn_func_takes_e4m3(hopper, head_dim, causal):
    """The same call on the CPU, from FlashAttention-3's arguments; v in any order of strides."""
    tensors = random_qkv("cpu", torch.float32, 2, 130, 200, 4, 2, head_dim)
    q, k, v = (x.to(E4M3) for x in tensors)
    descales = {f"{name}_descale": torch.rand(2, 2) + 0.5 for name in "qkv"}
    wanted, wanted_lse = flash_attn_func(q, k, v, causal=causal, return_lse=True, **descales)
    on_gpu = {name: x.to(hopper) for name, x in descales.items()}
    turned = v.transpose(1, 2).contiguous().to(hopper).transpose(1, 2)
    for values in (v.to(hopper), turned):
        out, lse = flash_attn_func(
            q.to(hopper), k.to(hopper), values, causal=causal, return_lse=True, **on_gpu
        )
        assert out.dtype == torch.bfloat16 and out.shape == q.shape
        error = (out.cpu().float() - wanted.float()).square().mean().sqrt()
        assert error < 0.05 * wanted.float().square().mean().sqrt()  # P rounded from other origins
        assert (lse.cpu() - wanted_lse).abs().max() < 0.06
    assert flash_attn_func(q.to(hopper), k.to(hopper), v.to(hopper)).isfinite().all()
    with pytest.raises(ValueError, match="v_descale is on cpu"):
        flash_attn_func(q.to(hopper), k.to(hopper), v.to(hopper), v_descale=torch.ones(2, 2))


def test_compiles_whole(hopper):
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 70, 90, 2, 2, 128)
    e4m3 = [x.to(E4M3) for x in (q, k, v)]
    for function, inputs in ((flash_attn_fp8_func, (q, k, v)), (flash_attn_func, e4m3)):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_extremes(hopper, head_dim, to):
    """Scores up to 2^100, as on the CPU; NaN stays in its row, or its block where int8 has none."""
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 200, 300, 2, 2, head_dim)
    q[0, 5], k[0, 100, 0, 3] = math.inf, -math.inf
    q[0, 70:80] *= 1000
    k[0, 200:210] *= 1000
    wanted, wanted_lse = flash_attn_fp8_func(q, k, v, qk_dtype=DTYPES[to], return_lse=True)
    q, k, v = (x.to(hopper) for x in (q, k, v))
    out, lse = flash_attn_fp8_func(q, k, v, qk_dtype=DTYPES[to], return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    size = wanted.float().square().mean().sqrt()
    assert (out.cpu().float() - wanted.float()).square().mean().sqrt() < 0.1 * size
    assert (lse.cpu() - wanted_lse)[..., :64].abs().median() < 0.06
    q[0, 7, 0, 0] = math.nan
    out = flash_attn_fp8_func(q, k, v, qk_dtype=DTYPES[to])
    rows = out.isnan().all(-1)
    assert torch.equal(rows, out.isnan().any(-1))
    assert rows.nonzero()[:, 1].tolist() == ([7] if to == "e4m3" else list(range(64)))
    assert not rows[:, :, 1].any()
    out = flash_attn_fp8_func(
        q[:, 64:], k.index_fill(1, torch.tensor([9], device=hopper), math.nan), v
    )
    assert out.isnan().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_long_rows_of_small_weights(hopper, head_dim, to, causal):
    """8-bit products are added in about 14 bits: sums over many keys must not stay there."""
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 192, 16384, 2, head_dim=head_dim)
    for size in (1.0, 0.1):  # the smaller the scores, the more equal the weights
        out, lse = flash_attn_fp8_func(
            q * size, k, v, causal=causal, qk_dtype=DTYPES[to], return_lse=True
        )
        exact, exact_lse = plain_attention(q * size, k, v, head_dim**-0.5, causal, torch.float64)
        error = (out.double() - exact).square().mean().sqrt()
        assert error <= 0.07 * exact.square().mean().sqrt()
        assert (lse - exact_lse).abs().max() < 0.1


@pytest.mark.parametrize(
    ("batch", "seqlen", "heads"), [(1, 1, 1), (3, 517, 5), (2, 4096, 8), (1, 9000, 2)]
)
@pytest.mark.parametrize("head_dim", [64, 128, 208])
def test_values_of_many_heads_and_keys(hopper, head_dim, batch, seqlen, heads):
    """Each head's maxima must be complete before its elements are rounded."""
    v = torch.randn(batch, seqlen, heads, head_dim, device=hopper, dtype=torch.bfloat16)
    v *= torch.logspace(-2, 2, heads * head_dim, device=hopper).view(heads, head_dim)
    wanted = quantize_fp8(v.cpu(), block=None)
    for _ in range(3):
        assert_same_bits(quantize_fp8(v, block=None), wanted)


def test_no_keys(hopper):
    q, k, _ = random_qkv(hopper, torch.bfloat16, 1, 200, 300, 2)
    no_keys = k[:, :0]
    out, lse = flash_attn_fp8_func(q, no_keys, no_keys, return_lse=True)
    assert not out.any() and (lse == -math.inf).all()


def test_the_same_bits_every_time(hopper):
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, 1000, 1000, 4, 2, 128)
    first = flash_attn_fp8_func(q, k, v, causal=True, seed=3, return_lse=True)
    for _ in range(3):
        again = flash_attn_fp8_func(q, k, v, causal=True, seed=3, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_in_a_cuda_graph(hopper):
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 256, 256, 2)
    wanted = flash_attn_fp8_func(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_fp8_func(q, k, v)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


def test_refusals(hopper):
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 128, 128, 2)
    forward = torch.ops.cute_kernels.flash_attn_fp8_forward
    q8, k8, v8 = quantised(q, k, v, "e4m3")
    scales = (q8.scale, k8.scale, v8.scale.squeeze(2))
    with pytest.raises(RuntimeError, match="v is not what quantize_fp8_values gives"):
        forward(q8.data, k8.data, q8.data, *scales, 1.0, False, False)
    with pytest.raises(RuntimeError, match="q_scale's shape does not fit"):
        forward(q8.data, k8.data, v8.data, scales[0][:, :1], *scales[1:], 1.0, False, False)
    with pytest.raises(RuntimeError, match="k does not have q's dtype"):
        forward(q8.data, k8.data.view(torch.int8), v8.data, *scales, 1.0, False, False)
    with pytest.raises(RuntimeError, match="softmax_scale is not above 0 and finite in float32"):
        forward(q8.data, k8.data, v8.data, *scales, -1.0, False, False)
    with pytest.raises(ValueError, match="q has scales of 32 rows"):
        flash_attn_fp8_func(quantize_fp8(q, block=32), quantize_fp8(k), v8)
    with pytest.raises(ValueError, match="k is on cpu"):
        flash_attn_fp8_func(q, k.cpu(), v)
    with pytest.raises(TypeError, match="out_dtype"):
        flash_attn_fp8_func(q, k, v, out_dtype=torch.float32)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_halves_of_the_keys_can_be_merged(hopper, head_dim, to):
    """By LSEs that are those of the quantised tensors, with peaked scores, too."""
    if not has_exact_lse(to, head_dim):
        pytest.skip(f"this build has no {to} kernel with an exact LSE for head dim {head_dim}")
    for size in (1, 6):
        q, k, v = random_qkv(hopper, torch.bfloat16, 1, 300, 1000, 2, 2, head_dim)
        q8 = quantize_fp8(q * size, dtype=DTYPES[to], incoherent=True)
        parts = []
        for keys in (slice(0, 400), slice(400, 1000)):
            k8 = quantize_fp8(k[:, keys], dtype=DTYPES[to], incoherent=True)
            v8 = quantize_fp8(v[:, keys], block=None)
            out, lse = flash_attn_fp8_func(q8, k8, v8, return_lse=True)
            inputs = (x.dequantize() for x in (q8, k8, v8))
            exact, exact_lse = plain_attention(*inputs, head_dim**-0.5, False, torch.float64)
            assert (lse - exact_lse).abs().max() < LSE_TOLERANCE[
                to
            ] * exact_lse.abs().max().clamp_min(1)
            parts.append((out.double(), lse.double(), exact, exact_lse))
        merged = []
        for out, lse in ((0, 1), (2, 3)):
            weights = (
                torch.stack([part[lse] for part in parts]).softmax(0).transpose(2, 3)[..., None]
            )
            merged.append(sum(w * part[out] for w, part in zip(weights, parts, strict=True)))
        assert (merged[0] - merged[1]).norm() < 0.06 * merged[1].norm()


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_rows_of_every_head_dim_in_the_bits_of_the_cpu(hopper, head_dim, to, dtype):
    for kind in ("normal", "extreme"):
        x = rough_inputs(INPUTS[dtype], head_dim, kind)
        for options in ({"incoherent": True, "seed": SEED}, {"incoherent": True, "smooth": True}):
            options["dtype"] = DTYPES[to]
            assert_same_bits(quantize_fp8(x.to(hopper), **options), quantize_fp8(x, **options))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("values", ["mean of 1", "mean of 4", "drift"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_values_with_a_mean(hopper, head_dim, values, causal):
    """8-bit products add up in 14 bits: what long sums of one sign lose, sums in fp32 keep."""
    for seqlen in (1024, 4096, 16384):
        q, k, v = random_qkv(hopper, torch.float32, 1, seqlen, seqlen, 1, head_dim=head_dim)
        if values == "drift":
            mean = torch.rand(head_dim, device=hopper) + 0.5
            v[:, : seqlen // 2] += 2 * mean
            v[:, seqlen // 2 :] -= mean
        else:
            v += int(values[-1])
        q, k, v = (x.bfloat16() for x in (q, k, v))
        rows = slice(seqlen - 256, None)
        out = flash_attn_fp8_func(q, k, v, causal=causal)[:, rows]
        arguments = (q[:, rows], k, v, head_dim**-0.5, causal, torch.float64, seqlen - 256, seqlen)
        exact, _ = plain_attention(*arguments)
        # What sums of 512 keys leave, at head dim 256, is 1% where half of the mean cancels out.
        is_wide = values == "drift" and (seqlen == 1024 or head_dim == 256)
        assert (out.double() - exact).norm() < (0.015 if is_wide else 0.01) * exact.norm()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_values_with_a_mean_where_origins_move(hopper, head_dim, to, causal):
    """Scores grow along the walk: what has left the accumulators is rescaled, too."""
    seqlen = 4001
    q, k, v = random_qkv(hopper, torch.float32, 1, 192, seqlen, 1, head_dim=head_dim)
    direction = torch.nn.functional.normalize(torch.randn(head_dim, device=hopper), dim=0)
    size = head_dim**0.25
    levels = torch.linspace(3.4, 0, seqlen, device=hopper)[:, None, None]
    q, k = 0.3 * q + 3 * size * direction, 0.3 * k + size * levels * direction
    q, k, v = q.bfloat16(), k.bfloat16(), (v + 1).bfloat16()
    out = flash_attn_fp8_func(q, k, v, causal=causal, qk_dtype=DTYPES[to])
    exact, _ = plain_attention(q, k, v, head_dim**-0.5, causal, torch.float64)
    assert (out.double() - exact).norm() < 0.01 * exact.norm()
