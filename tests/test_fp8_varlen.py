"""FP8 of packed sequences, windows and sinks: each sequence is as good as the dense call on it
alone, on both devices."""

import dataclasses
import math
import random

import pytest
import torch
from oracle import Attention
from packed import random_packed, starts
from parity import random_qkv
from torch._subclasses import FakeTensorMode

from cute_kernels import (
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_varlen_func,
    tile_configs,
)
from cute_kernels.fp8 import GPU_BUILT, quantize_fp8

E4M3 = torch.float8_e4m3fn
BF16 = torch.bfloat16
LENGTHS = ([1, 63, 64, 65, 0, 200, 129, 320], [5, 64, 0, 130, 7, 333, 128, 320])
WINDOWS = [(-1, -1), (-1, 0), (100, 0), (60, 40), (-1, 30), (0, 0)]


@pytest.fixture(autouse=True)
def _built(request):
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cuda":
        _skip_without_kernels()


def _skip_without_kernels(head_dims=(64, 64), to="int8"):
    """Builds may hold only some rows that take any call, or no FP8."""
    if not GPU_BUILT or not any(
        row["any_call"]
        and row["dtype"] == to
        and row["head_dim"] >= head_dims[0]
        and row["head_dim_v"] >= head_dims[1]
        for row in tile_configs("forward_fp8")
    ):
        pytest.skip(f"this build has no FP8 kernel for all calls with {to}, {head_dims}")


def packed_on(device, slots_q, slots_k=None, head_dims=(64, 64), heads=(4, 2), **options):
    if device == "cuda":
        _skip_without_kernels(head_dims)
    chance = random.Random(len(slots_q))
    slots_k = slots_q if slots_k is None else slots_k
    packed = random_packed(chance, device, BF16, slots_q, slots_k, head_dims, heads, **options)
    packed.k += 2  # what smoothing takes away, and a sink and the LSE must see
    return packed


def run(packed, **options):
    out, lse = flash_attn_fp8_varlen_func(
        *packed.qkv, **packed.lengths(), **options, return_lse=True
    )
    total, heads, _ = packed.q.shape
    assert out.shape == (total, heads, packed.v.shape[2]) and out.dtype == packed.q.dtype
    assert lse.shape == (heads, total) and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    return out, lse


def assert_rows_near(out, exact, largest):
    """No row is off by more than this, relative to what its size may be."""
    error = (out.double() - exact).norm(dim=-1)
    size = exact.norm(dim=-1)
    assert (error <= largest * size + 1e-6).all(), (error / size).nan_to_num(math.inf).max()


def assert_as_good_as_alone(results, packed, causal=False, window_size=(-1, -1), **options):
    """Against fp64 on the 16-bit inputs."""
    out, lse = results
    scale = packed.q.shape[-1] ** -0.5
    sinks = options.get("sinks")
    for of_q, of_k in packed.sequences():
        one = [x[None, part] for x, part in zip(packed.qkv, (of_q, of_k, of_k), strict=True)]
        exact = Attention(*one, scale, causal, window_size=window_size, sinks=sinks)
        right = exact.out_rows.transpose(1, 2)
        mask = {"causal": causal, "window_size": window_size}
        alone, _ = flash_attn_fp8_func(*one, **mask, **options, return_lse=True)
        part, part_lse = out[None, of_q], lse[None, :, of_q]
        error, of_alone = ((x.double() - right).norm() for x in (part, alone))
        assert error <= 1.1 * of_alone + 1e-3 * right.norm()
        assert_rows_near(part, right, 0.4)
        empty = exact.lse == -math.inf
        assert torch.equal(part_lse == -math.inf, empty)
        wrong = (part_lse.double() - exact.lse).masked_fill(empty, 0.0).abs()
        assert wrong.numel() == 0 or wrong.max() < 0.15
        assert not part.transpose(1, 2)[exact.unseen].any()
    unused, _ = packed.unused()
    assert not out[unused].any() and (lse[:, unused] == -math.inf).all()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window_size", WINDOWS, ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (48, 80), (192, 128), (128, 128), (256, 256)])
def test_sequences_are_as_good_as_alone(device, head_dims, window_size, with_sinks):
    if device == "cpu" and (head_dims[0] > 64 or with_sinks != (window_size[0] >= 0)):
        pytest.skip("the CPU has one implementation: fewer of its calls tell the same")
    packed = packed_on(device, *LENGTHS, head_dims, used=True, tail=5)
    options = {"window_size": window_size}
    if with_sinks:
        options["sinks"] = torch.tensor([0.5, -math.inf, 3.0, -2.0], device=device)
    results = run(packed, **options)
    assert_as_good_as_alone(results, packed, **options)
    spoilt = run(packed.spoilt(math.nan), **options)
    for a, b in zip(results, spoilt, strict=True):
        if device == "cpu":
            assert torch.equal(a, b)
        # Rows of a warp share the moves of their origins: of a GPU only nearly the same is asked.
        assert (
            a.double() - b.double()
        ).nan_to_num().norm() <= 0.01 * a.double().nan_to_num().norm()
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("to", [E4M3, torch.int8], ids=["e4m3", "int8"])
@pytest.mark.parametrize("smooth", [False, True])
def test_options(device, smooth, to):
    packed = packed_on(device, [130, 70, 0, 1])
    options = {"causal": True, "smooth_k": smooth, "qk_dtype": to, "seed": 7}
    if device == "cuda":
        _skip_without_kernels((64, 64), "int8" if to == torch.int8 else "e4m3")
    results = run(packed, **options)
    if smooth:
        assert_as_good_as_alone(results, packed, **options)
    fp16 = flash_attn_fp8_varlen_func(
        *packed.qkv, **packed.lengths(), **options, out_dtype=torch.float16
    )
    assert fp16.dtype == torch.float16
    assert (fp16.double() - results[0].double()).abs().max() < 0.02


def test_random_combinations(device):
    chance = random.Random(5)
    for _ in range(3 if device == "cpu" else 60):
        count = chance.randint(1, 7)
        most = 150 if device == "cpu" else 900
        slots = [
            [chance.choice([0, 1, 64, chance.randint(2, most)]) for _ in range(count)] for _ in "qk"
        ]
        key_heads = chance.choice([1, 2])
        heads = key_heads * chance.choice([1, 3]), key_heads
        dims = chance.choice(
            [(64, 64), (64, 32), (16, 48)]
            + [(128, 128), (192, 128), (96, 96), (256, 240)] * (device == "cuda")
        )
        packed = packed_on(
            device, *slots, dims, heads, used=chance.random() < 0.5, tail=chance.choice([0, 3])
        )
        left, right = (chance.choice([-1, -1, 0, 33, chance.randint(1, most)]) for _ in "lr")
        options = {"causal": chance.random() < 0.4, "window_size": (left, right)}
        if chance.random() < 0.4:
            options["sinks"] = (
                torch.randn(heads[0], device=device).mul(2).to(chance.choice([BF16, torch.float32]))
            )
        assert_as_good_as_alone(run(packed, **options), packed, **options)


@pytest.mark.parametrize("window_size", [(50, 0), (-1, 20), (10, 30)], ids=str)
def test_dense_windows_and_sinks(device, window_size):
    q, k, v = random_qkv(device, BF16, 2, 203, 300, 4, 2)
    k = k + 2
    sinks = torch.tensor([1.0, -1.0, 4.0, -math.inf], device=device)
    for options in ({}, {"sinks": sinks}, {"sinks": sinks.to(BF16), "smooth_k": False}):
        out, lse = flash_attn_fp8_func(q, k, v, window_size=window_size, **options, return_lse=True)
        exact = Attention(
            q, k, v, 0.125, False, window_size=window_size, sinks=options.get("sinks")
        )
        right = exact.out_rows.transpose(1, 2)
        error = 0.07 if options.get("smooth_k", True) else 0.4
        assert (out.double() - right).norm() < error * right.norm()
        assert (lse.double() - exact.lse).abs().max() < (0.15 if error < 0.1 else 1)
        quantised = (
            quantize_fp8(q, dtype=torch.int8, incoherent=True),
            quantize_fp8(
                k, dtype=torch.int8, incoherent=True, smooth=options.get("smooth_k", True)
            ),
            quantize_fp8(v, block=None),
        )
        again = flash_attn_fp8_func(
            *quantised, window_size=window_size, sinks=options.get("sinks"), return_lse=True
        )
        assert (again[0].double() - out.double()).norm() < 0.01 * right.norm()
        assert (again[1] - lse).abs().max() < 0.15  # Q's rounding times the shift


def test_a_row_without_keys_has_its_sink(device):
    q, k, v = random_qkv(device, BF16, 1, 100, 20, 2)
    sinks = torch.tensor([1.5, -2.0], device=device)
    out, lse = flash_attn_fp8_func(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert not out[:, :80].any() and torch.equal(lse[0, :, :80], sinks[:, None].expand(2, 80))
    out, lse = flash_attn_fp8_func(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True)
    assert not out.any() and torch.equal(lse[0], sinks[:, None].expand(2, 100))


def test_zeros_meet_masks(device):
    """Scales of 0 would be NaN times -inf."""
    slots = [64, 100, 1, 130]
    packed = packed_on(device, slots)
    packed = dataclasses.replace(packed, q=packed.q * 0, k=packed.k * 0)
    for options in ({"causal": True}, {"window_size": (20, 0)}, {}):
        out, _ = run(packed, **options)
        for of_q, of_k in packed.sequences():
            one = [x[None, part] for x, part in zip(packed.qkv, (of_q, of_k, of_k), strict=True)]
            right = Attention(
                *one,
                0.125,
                options.get("causal", False),
                window_size=options.get("window_size", (-1, -1)),
            )
            assert_rows_near(out[None, of_q], right.out_rows.transpose(1, 2), 0.15)


@pytest.mark.parametrize("attention_chunk", [0, 100])
@pytest.mark.parametrize("descaled", [False, True])
def test_e4m3_with_descales(device, descaled, attention_chunk):
    """FlashAttention-3's arguments, packed and dense."""
    if device == "cuda":
        _skip_without_kernels((64, 64), "e4m3")
    slots = [70, 0, 200, 64, 5]
    packed = packed_on(device, slots)
    packed = dataclasses.replace(packed, k=packed.k - 2)
    e4m3 = [x.to(E4M3) for x in packed.qkv]
    descales = {}
    if descaled:
        names = ("q_descale", "k_descale", "v_descale")
        descales = {name: torch.rand(5, 2, device=device) + 0.5 for name in names}
    options = {"causal": True, "window_size": (150, 0), "attention_chunk": attention_chunk}
    sinks = torch.randn(4, device=device)
    out, lse = flash_attn_varlen_func(
        *e4m3, **packed.lengths(), **descales, **options, sinks=sinks, return_lse=True
    )
    assert out.dtype == BF16
    for i, (rows, _) in enumerate(packed.sequences()):
        of_one = [x[None, rows].double() for x in e4m3]
        if descaled:
            q_scale, k_scale, v_scale = (x[i] for x in descales.values())
            of_one[0] *= q_scale.repeat_interleave(2)[:, None]
            of_one[1] *= k_scale[:, None]
            of_one[2] *= v_scale[:, None]
        exact = Attention(*of_one, 0.125, sinks=sinks.double(), **options)
        right = exact.out_rows.transpose(1, 2)
        assert (out[None, rows].double() - right).norm() <= 0.05 * right.norm()
        assert_rows_near(out[None, rows], right, 0.3)
        assert (lse[None, :, rows].double() - exact.lse).abs().amax() < 0.04 if slots[i] else True
    dense = [x[70:270].unflatten(0, (2, 100)) for x in e4m3]
    two = {name: x[2:4] for name, x in descales.items()}
    out, lse = flash_attn_func(*dense, **two, **options, sinks=sinks, return_lse=True)
    one = [x[0:1] for x in dense]
    again, again_lse = flash_attn_func(
        *one, **{name: x[:1] for name, x in two.items()}, **options, sinks=sinks, return_lse=True
    )
    assert torch.equal(out[:1], again) and torch.equal(lse[:1], again_lse)


def test_chunks(device):
    packed = packed_on(device, [300, 40, 0, 129])
    out, lse = run(packed, attention_chunk=64, causal=True)
    for of_q, of_k in packed.sequences():
        one = [x[None, part] for x, part in zip(packed.qkv, (of_q, of_k, of_k), strict=True)]
        exact = Attention(*one, 0.125, True, attention_chunk=64)
        right = exact.out_rows.transpose(1, 2)
        assert (out[None, of_q].double() - right).norm() <= 0.07 * right.norm()
        assert of_q.stop == of_q.start or (lse[None, :, of_q] - exact.lse).abs().max() < 0.15


@pytest.mark.parametrize("which", ["k", "v"])
def test_a_nan_stays_in_its_sequence(device, which):
    packed = packed_on(device, [100, 70, 200])
    right = run(packed, causal=True)
    wild = {which: getattr(packed, which).clone()}
    wild[which][100] = math.nan  # the second sequence's first key
    out, _ = run(dataclasses.replace(packed, **wild), causal=True)
    for rows in (slice(0, 100), slice(170, 370)):
        assert out[rows].isfinite().all()
        assert (out[rows].double() - right[0][rows].double()).norm() < 0.01 * right[0].norm()
    assert out[100:170].isnan().any()


def call(device="cpu", **changes):
    packed = packed_on(device, [3, 5])
    return {**dict(zip("qkv", packed.qkv, strict=True)), **packed.lengths(), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": 3}, TypeError, "q is a int, must be a torch.Tensor"),
        ({"q": torch.zeros(8, 4, 24, dtype=BF16)}, ValueError, "q has head_dim 24"),
        ({"q": torch.zeros(1, 8, 4, 64, dtype=BF16)}, ValueError, "q has shape"),
        ({"k": torch.zeros(8, 3, 64, dtype=BF16)}, ValueError, "v has total and heads"),
        ({"v": torch.zeros(8, 2, 64, dtype=torch.int8)}, TypeError, "v has dtype"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 8])}, TypeError, "cu_seqlens_q has dtype"),
        ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k is a NoneType"),
        ({"cu_seqlens_k": torch.tensor([0, 8]).int()}, ValueError, "cu_seqlens_k has shape"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 9]).int()}, ValueError, "cu_seqlens_k.2. is 9"),
        ({"max_seqlen_k": 4}, ValueError, "max_seqlen_k is 4, must be at least 5"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q is -1"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale is 0"),
        ({"window_size": (-2, 0)}, ValueError, "window_size is"),
        ({"attention_chunk": -1}, ValueError, "attention_chunk is -1"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks has shape"),
        ({"sinks": torch.zeros(4).int()}, TypeError, "sinks has dtype"),
        ({"qk_dtype": BF16}, TypeError, "dtype is torch.bfloat16"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype is torch.int8"),
        ({"tile_config": "none"}, ValueError, "tile_config is 'none'"),
    ],
)
def test_refusals(device, changes, error, message):
    of_contents = "is 9" in message or "at least 5" in message
    if device == "cuda" and of_contents:
        pytest.skip("contents of tensors on a GPU are not looked at")
    moved = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in changes.items()}
    with pytest.raises(error, match=message):
        flash_attn_fp8_varlen_func(**call(device, **moved))


def test_messages_name_what_was_given():
    q, k, v = (torch.zeros(8, 2, 64).to(torch.float8_e4m3fn) for _ in "qkv")
    starts, wrong = torch.tensor([0, 8]).int(), torch.tensor([0, 9]).int()
    with pytest.raises(ValueError, match=r"cu_seqlens_k\[1\] is 9, must be at most 8"):
        flash_attn_varlen_func(q, k, v, starts, wrong)
    with pytest.raises(ValueError, match="softcap is nan"):
        flash_attn_varlen_func(q, k, v, starts, starts, softcap=math.nan)


def test_derivatives_are_refused(device):
    arguments = call(device)
    arguments["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="has no gradient in FP8"):
        flash_attn_fp8_varlen_func(**arguments)
    with torch.no_grad():
        assert flash_attn_fp8_varlen_func(**arguments).shape == (8, 4, 64)


@pytest.mark.parametrize("slots", [[], [0, 0], [0]], ids=str)
def test_nothing(device, slots):
    packed = packed_on(device, slots)
    out, lse = run(packed, causal=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)
    tail = dataclasses.replace(packed, q=torch.ones(9, 4, 64, dtype=BF16, device=device))
    out, lse = run(tail, causal=True)
    assert not out.any() and (lse == -math.inf).all()


@pytest.mark.skipif(not GPU_BUILT, reason="built without CUTE_KERNELS_FP8")
def test_compiles_whole(device):
    torch._dynamo.reset()
    packed = packed_on(device, [40, 3, 60])

    def function(q, k, v, lengths):
        return flash_attn_fp8_varlen_func(
            q, k + 1, v, **lengths, causal=True, attention_chunk=32, return_lse=True
        )

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got = compiled(*packed.qkv, packed.lengths())
    for a, b in zip(got, function(*packed.qkv, packed.lengths()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not GPU_BUILT, reason="built without CUTE_KERNELS_FP8")
def test_fake_calls_know_the_form(device):
    packed = packed_on(device, [40, 3, 60], head_dims=(48, 80))
    real = run(packed, window_size=(9, 0))
    with FakeTensorMode() as mode:
        arguments = dict(zip("qkv", packed.qkv, strict=True)) | packed.lengths()
        fake = flash_attn_fp8_varlen_func(
            **{n: x if x is None else mode.from_tensor(x) for n, x in arguments.items()},
            window_size=(9, 0),
            return_lse=True,
        )
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row["name"]) for row in tile_configs("forward_fp8") if row["any_call"]],
)
def test_every_row_of_the_table(hopper, row):
    """Packed and dense, lengths around the row's tiles."""
    m, n = row["tile_m"], row["tile_n"]
    slots_q = [1, m - 1, m, m + 1, 0, 63, 2 * m + 65, 64]
    slots_k = [n, n + 1, 1, 5 * n - 1, 7, 0, 900, 64]
    head_dims = row["head_dim"], row["head_dim_v"]
    packed = packed_on(hopper, slots_q, slots_k, head_dims, used=True, tail=3)
    to = torch.int8 if row["dtype"] == "int8" else E4M3
    for window_size in WINDOWS:
        options = {"window_size": window_size, "qk_dtype": to}
        results = run(packed, tile_config=row["name"], **options)
        assert_as_good_as_alone(results, packed, **options)


@pytest.mark.parametrize("window_size", [(-1, 0), (1500, 0)], ids=str)
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row["name"]) for row in tile_configs("forward_fp8") if row["any_call"]],
)
def test_values_with_a_mean(hopper, row, window_size):
    """8-bit products add up in 14 bits, which would leave 2 to 5% of these sums."""
    packed = packed_on(hopper, [4096, 700, 3001], head_dims=(row["head_dim"], row["head_dim_v"]))
    packed.v += 1
    to = torch.int8 if row["dtype"] == "int8" else E4M3
    options = {"window_size": window_size, "qk_dtype": to, "tile_config": row["name"]}
    out, _ = run(packed, **options)
    for of_q, of_k in packed.sequences():
        one = [x[None, part] for x, part in zip(packed.qkv, (of_q, of_k, of_k), strict=True)]
        exact = Attention(*one, row["head_dim"] ** -0.5, False, window_size=window_size)
        right = exact.out_rows.transpose(1, 2)[0, -256:]
        assert (out[of_q][-256:].double() - right).norm() < 0.01 * right.norm()


def test_many_short_sequences(hopper):
    chance = random.Random(1)
    packed = packed_on(hopper, [chance.randint(0, 40) for _ in range(3000)], heads=(2, 1))
    out, _ = run(packed, causal=True)
    exact = flash_attn_varlen_func(
        *(x.float().cpu() for x in packed.qkv),
        **{n: None if x is None else x.cpu() for n, x in packed.lengths().items()},
        causal=True,
    )
    assert (out.cpu() - exact).norm() < 0.08 * exact.norm()
    assert_rows_near(out.cpu(), exact.double(), 0.5)


def test_lengths_may_change_under_a_captured_graph(hopper):
    packed = packed_on(hopper, [100, 200, 300], tail=50)
    lengths = packed.lengths()
    lengths["seqused_k"] = torch.tensor([100, 200, 300], dtype=torch.int32, device=hopper)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flash_attn_fp8_varlen_func(*packed.qkv, **lengths, causal=True, return_lse=True)
    for slots, used_k in [([100, 200, 300], [3, 200, 77]), ([0, 640, 10], [0, 640, 9])]:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            lengths[name].copy_(torch.tensor(starts(slots), dtype=torch.int32))
        lengths["seqused_k"].copy_(torch.tensor(used_k, dtype=torch.int32))
        graph.replay()
        now = dataclasses.replace(packed, slots_q=slots, slots_k=slots, used_k=used_k)
        assert_as_good_as_alone(results, now, causal=True)


def test_the_same_bits_each_time(hopper):
    packed = packed_on(hopper, [700, 3, 0, 1300, 64, 200], tail=9)
    results = [run(packed, window_size=(200, 0)) for _ in range(30)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_contents_that_are_wrong_break_nothing(hopper):
    """What cu_seqlens holds is not looked at: results are, memory is not."""
    packed = packed_on(hopper, [100, 200, 300])
    for values in ([0, 500, 100, 600], [-50, 100, 10**9, 2**31 - 1], [600, 300, 100, 0]):
        wrong = torch.tensor(values, dtype=torch.int32, device=hopper)
        lengths = packed.lengths() | {"cu_seqlens_q": wrong, "cu_seqlens_k": wrong}
        out = flash_attn_fp8_varlen_func(*packed.qkv, **lengths, causal=True)
        torch.cuda.synchronize()
        assert out.shape == packed.q.shape
    assert_as_good_as_alone(run(packed), packed)
