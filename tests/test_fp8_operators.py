"""The FP8 operators in PyTorch's machinery: schemas, shapes, compilers, graphs; and what they
refuse."""

import math
import subprocess
import sys

import pytest
import torch
from parity import plain_attention, random_qkv
from torch._subclasses import FakeTensorMode

from cute_kernels.fp8 import GPU_BUILT, flash_attn_fp8_func, quantize_fp8

pytestmark = pytest.mark.skipif(not GPU_BUILT, reason="built without CUTE_KERNELS_FP8")

E4M3 = torch.float8_e4m3fn
OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
SIZES = [{}, {"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"heads": 0, "key_heads": 2}]


def operator(name):
    return getattr(torch.ops.cute_kernels, name).default


def calls(device, head_dim=64, **sizes):
    """Operators and inputs."""
    sizes = {"seqlen_q": 70, "seqlen_k": 90, "heads": 4, "key_heads": 2} | sizes
    q, k, v = random_qkv(
        device,
        torch.bfloat16,
        2 if "batch" not in sizes else sizes.pop("batch"),
        **sizes,
        head_dim=head_dim,
    )
    rows, values = operator("quantize_fp8_rows"), operator("quantize_fp8_values")
    q8, q_scale, _ = rows(q, False, True, -3, True)
    k8, k_scale, _ = rows(k, True, True, -3, True)
    v8, v_scale = values(v)
    scales = q_scale, k_scale, v_scale
    whole = (
        scales[0].new_ones((q.shape[0], q.shape[2], 1)),
        *(scales[0].new_ones((k.shape[0], k.shape[2], 1)) for _ in range(2)),
    )
    forward = operator("flash_attn_fp8_forward")
    return [
        (rows, (q.transpose(1, 2).contiguous().transpose(1, 2), True, True, 2**62, False)),
        (rows, (k, False, False, -1, True)),
        (values, (v,)),
        (values, (v.to(E4M3),)),
        (forward, (q8, k8, v8, *scales, 0.3, True, False)),
        (forward, (q.to(E4M3), k.to(E4M3), v8, *whole, 0.3, False, True)),
        (operator("flash_attn_fp8"), (q, k, v, 0.3, True, True, True, 5, True, False)),
        (operator("flash_attn_fp8"), (q, k, v, 0.3, False, False, False, 5, False, True)),
        *packed_calls(q, k, v),
    ]


def packed_calls(q, k, v):
    """Of sequences of two rows less than what lies there."""
    batch = q.shape[0]
    starts = [
        torch.arange(batch + 1, dtype=torch.int32, device=q.device) * x.shape[1] for x in (q, k)
    ]
    used = [
        torch.full_like(s[1:], max(0, x.shape[1] - 2)) for s, x in zip(starts, (q, k), strict=True)
    ]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    values, forward, whole = (
        operator(name)
        for name in (
            *("quantize_fp8_varlen_values", "flash_attn_fp8_varlen_forward"),
            "flash_attn_fp8_varlen",
        )
    )
    e4m3 = [x.to(E4M3) for x in (q, k, v)]
    data, _ = values(e4m3[2], starts[1], used[1])
    scales = [torch.ones(batch, x.shape[1], 1, device=q.device) for x in (q, k, k)]
    sinks = torch.zeros(q.shape[1], device=q.device)
    lengths = (*starts, *used, None)
    return [
        (values, (v, starts[1], used[1])),
        (values, (e4m3[2], starts[1], None)),
        (forward, (*e4m3[:2], data, *scales, *lengths, 0.3, True, False, sinks)),
        (whole, (q, k, v, *lengths, 0.3, True, True, True, 5, True, False, True, sinks)),
        (whole, (q, k, v, *lengths, 0.3, False, False, False, 5, False, True)),
    ]


@pytest.mark.parametrize("index", range(13))
def test_opcheck(device, index):
    function, inputs = calls(device)[index]
    # PyTorch does not multiply e4m3 inputs, which its comparison of them before and after needs.
    has_e4m3 = any(isinstance(x, torch.Tensor) and x.dtype == E4M3 for x in inputs)
    tests = OPCHECK[has_e4m3:]
    if device == "cuda" and function is operator("quantize_fp8_varlen_values"):
        tests = tests[:-1]  # it compares results, which have bits between sequences that none wrote
    result = torch.library.opcheck(function, inputs, test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}


def form(x):
    return x.shape, x.stride(), x.dtype, x.device


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_shape_inference_is_what_is_allocated(device, sizes):
    for function, inputs in calls(device, **sizes):
        real = function(*inputs)
        with FakeTensorMode() as mode:
            fake = function(
                *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs)
            )
        assert [form(x) for x in fake] == [form(x) for x in real]


@pytest.mark.parametrize("head_dim", [64, 256])
def test_no_keys_give_zeros(device, head_dim):
    """Whatever lies where scales of no keys would."""
    for with_lse in (False, True):
        for function, inputs in calls(device, head_dim, seqlen_k=0):
            if "flash_attn" not in str(function):
                continue
            if function is operator("flash_attn_fp8"):
                inputs = (*inputs, with_lse)
            junk = [torch.full((2**n,), math.nan, device=device) for n in range(4, 16)]
            del junk
            out, lse, *shift = function(*inputs)
            assert not out.any()  # NaN is
            assert not any(x.any() for x in shift)
            assert ((lse == -math.inf) | (lse == 0)).all()  # 0 is a sink


def test_more_values_than_kernels_count():
    with FakeTensorMode():  # needs no GPU
        for device in ("cpu", "cuda"):
            q, k = (torch.empty(n, 1, 16, device=device, dtype=torch.half) for n in (5, 1280))
            for batch in (2**23 - 11, 2**23 - 10):
                starts = torch.empty(batch + 1, device=device, dtype=torch.int32)
                whole = (q, k, k, starts, starts, None, None, None, 0.3, True, True, True, 5, True)
                for name, inputs in (
                    ("quantize_fp8_varlen_values", (k, starts, None)),
                    ("flash_attn_fp8_varlen", (*whole, False)),
                ):
                    if batch < 2**23 - 10:
                        operator(name)(*inputs)
                        continue
                    with pytest.raises(ValueError, match=rf"^v has total 1280 of {batch} sequenc"):
                        operator(name)(*inputs)


def test_operators_on_the_cpu_are_the_public_functions():
    q, k, v = random_qkv("cpu", torch.bfloat16, 2, 70, 90, 4, 2)
    seed = 2**64 - 3
    out, lse, shift = torch.ops.cute_kernels.flash_attn_fp8(
        *(q, k, v, 0.3, True, True, True, -3, True, False)
    )
    k8 = quantize_fp8(k, incoherent=True, seed=seed, dtype=torch.int8, smooth=True)
    q8 = quantize_fp8(q, incoherent=True, seed=seed, dtype=torch.int8)
    wanted = flash_attn_fp8_func(q, k, v, 0.3, True, seed=seed)
    assert torch.equal(out, wanted)
    assert torch.equal(shift, k8.shift)
    again, again_lse = torch.ops.cute_kernels.flash_attn_fp8_forward(
        *(q8.data, k8.data, torch.ops.cute_kernels.quantize_fp8_values(v)[0]),
        *(q8.scale, k8.scale, quantize_fp8(v, block=None).scale.squeeze(2), 0.3, True, False),
    )
    assert torch.equal(out, again) and torch.equal(lse, again_lse)


def test_values_stand_as_the_kernel_reads_them():
    """Position p of 16 keys holds key p % 4 // 2 * 8 + p // 4 * 2 + p % 2; then zeros."""
    keys = torch.arange(40.0).view(1, 40, 1, 1).expand(1, 40, 2, 16)
    data, _ = torch.ops.cute_kernels.quantize_fp8_values(keys.to(E4M3))
    assert data.shape == (1, 2, 16, 48)
    order = [p // 16 * 16 + p % 4 // 2 * 8 + p % 16 // 4 * 2 + p % 2 for p in range(48)]
    wanted = [float(torch.tensor(float(key)).to(E4M3)) if key < 40 else 0.0 for key in order]
    assert data[0, 1, 7].float().tolist() == wanted


def refusals(device):
    """Inputs that an operator refuses, and how."""
    q, k, v = random_qkv(device, torch.bfloat16, 2, 70, 90, 4, 2)
    rows, values, forward, whole = (
        operator(name)
        for name in (
            *("quantize_fp8_rows", "quantize_fp8_values"),
            *("flash_attn_fp8_forward", "flash_attn_fp8"),
        )
    )
    q8, q_scale, _ = rows(q, False, True, 3, True)
    k8, k_scale, _ = rows(k, True, True, 3, True)
    v8, v_scale = values(v)

    def changed(**changes):
        inputs = {"q": q8, "k": k8, "v": v8, "q_scale": q_scale, "k_scale": k_scale}
        inputs |= {"v_scale": v_scale, "softmax_scale": 0.3, "causal": False, "out_float16": False}
        return tuple((inputs | changes).values())

    tail = (0.3, False, True, True, 0, True, False)
    return [
        (rows, (q[0], True, True, 0, True), ValueError, "x has shape"),
        (rows, (q.int(), True, True, 0, True), TypeError, "x has dtype torch.int32"),
        (rows, (q[..., :40], True, True, 0, True), ValueError, "x has head_dim 40"),
        (rows, (q.mT.contiguous().mT, True, True, 0, True), ValueError, "x has strides"),
        (values, (v[..., 0],), ValueError, "v has shape"),
        (values, (v.to(torch.int8),), TypeError, "v has dtype torch.int8"),
        (forward, changed(v=q8), ValueError, "v has shape|v has dtype"),
        (forward, changed(v=v8[..., :80]), ValueError, "v has shape"),
        (forward, changed(k=k8.view(E4M3)), TypeError, "k has dtype"),
        (forward, changed(q=q), TypeError, "q has dtype torch.bfloat16"),
        (forward, changed(q_scale=q_scale[:, :1]), ValueError, "q_scale has shape"),
        (forward, changed(k_scale=k_scale[0]), ValueError, "k_scale has shape"),
        (forward, changed(v_scale=v_scale.double()), TypeError, "v_scale has dtype"),
        (forward, changed(softmax_scale=-1.0), ValueError, "softmax_scale is -1"),
        (forward, changed(q=q8[:, :, :3]), ValueError, "q has 3 heads"),
        (whole, (q, k[:1], v, *tail), ValueError, "k has batch 1"),
        (whole, (q, k, v[:, 1:], *tail), ValueError, "v has seqlen"),
        (whole, (q, k, v.to(E4M3), *tail), TypeError, "v has dtype torch.float8_e4m3fn"),
    ]


@pytest.mark.parametrize("index", range(18))
def test_operators_refuse_with_and_without_data(index):
    function, inputs, error, message = refusals("cpu")[index]
    if error is ValueError and "|" in message:
        error = (ValueError, TypeError)
    with pytest.raises(error, match=message):
        function(*inputs)
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        function(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs))


@pytest.mark.parametrize("index", range(18))
def test_cuda_operators_refuse_the_same(hopper, index):
    function, inputs, _, _ = refusals(hopper)[index]
    with pytest.raises(RuntimeError):
        function(*inputs)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_fake_calls_leave_nothing_behind(device, head_dim):
    """No fake tensor may wait in a cache for a real call; nor the other way round."""
    x = random_qkv(device, torch.bfloat16, 1, 70, head_dim=head_dim)[0]
    for seed in (77 + head_dim, 78 + head_dim):
        if seed % 2:
            with FakeTensorMode() as mode:
                quantize_fp8(mode.from_tensor(x), incoherent=True, seed=seed)
                flash_attn_fp8_func(*(mode.from_tensor(x) for _ in range(3)), seed=seed)
        real = quantize_fp8(x, incoherent=True, seed=seed)
        assert (real.dequantize() - x).abs().max() < 0.4
        with FakeTensorMode() as mode:
            fake = quantize_fp8(mode.from_tensor(x), incoherent=True, seed=seed)
        assert (form(fake.data), form(fake.scale)) == (form(real.data), form(real.scale))


def test_meta_tensors():
    q = torch.empty(2, 70, 4, 64, device="meta", dtype=torch.bfloat16)
    out, lse = flash_attn_fp8_func(q, q, q, causal=True, return_lse=True)
    assert form(out) == form(q) and form(lse)[:1] == ((2, 4, 70),)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(device, backend):
    torch._dynamo.reset()
    q, k, v = random_qkv(device, torch.bfloat16, 1, 70, 90, 2)

    def function(q, k, v):
        return flash_attn_fp8_func(q, k + 1, v, causal=True, return_lse=True)

    if device == "cpu" and backend == "inductor":
        pytest.skip("the CPU path is many operations: minutes to compile")
    out, lse = torch.compile(function, backend=backend, fullgraph=True)(q, k, v)
    wanted, wanted_lse = function(q, k, v)
    assert torch.equal(out, wanted)
    assert (lse - wanted_lse).abs().max() < 1e-4


FIRST_CALL = """
import torch
from cute_kernels import flash_attn_func
from cute_kernels.fp8 import flash_attn_fp8_func, quantize_fp8

torch.manual_seed(0)
x = torch.randn(1, 130, 2, {head_dim}, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = {call}
graph.replay()
torch.cuda.synchronize()
wanted = {call}
assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True)), (result, wanted)
"""


@pytest.mark.parametrize(
    "call",
    [
        "flash_attn_fp8_func(x, x, x, causal=True, return_lse=True)",
        "flash_attn_fp8_func(x, x, x, qk_dtype=torch.float8_e4m3fn, return_lse=True)",
        "[quantize_fp8(x.float(), incoherent=True, smooth=True, seed=2**63).dequantize()]",
        "[quantize_fp8(x, block=None).dequantize()]",
        "flash_attn_func(*(3 * [x.to(torch.float8_e4m3fn)]), return_lse=True)",
    ],
)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_first_call_of_a_process_in_a_cuda_graph(hopper, head_dim, call):
    script = FIRST_CALL.format(head_dim=head_dim, call=call)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seqlen", [4194240, 4194241, 4194303, 4194304, 4300000])
def test_more_blocks_of_rows_than_a_grid_has(hopper, seqlen):
    """65535 blocks of 64 rows are 4194240 rows."""
    x = torch.randn(1, seqlen, 1, 64, device=hopper, dtype=torch.bfloat16)
    x8 = quantize_fp8(x, incoherent=True, dtype=torch.int8)
    tail = slice(4194240 - 4096, None)
    wanted = quantize_fp8(x[:, tail].cpu(), incoherent=True, dtype=torch.int8)
    assert torch.equal(x8.data[:, tail].cpu(), wanted.data)
    assert torch.equal(x8.scale[..., 65535 - 64 :].cpu(), wanted.scale)
    q = x[:, -200:] * 4  # each finds itself, so that no sum is of millions
    out = flash_attn_fp8_func(q, x, x, causal=True)
    exact, _ = plain_attention(q, x, x, 0.125, True, torch.float32)
    assert (out - exact).norm() < 0.1 * exact.norm()
    out = flash_attn_fp8_func(x, x[:, :100], x[:, :100])
    exact, _ = plain_attention(x[:, -200:], x[:, :100], x[:, :100], 0.125, False, torch.float32)
    assert (out[:, -200:] - exact).norm() < 0.1 * exact.norm()


def test_more_values_than_a_grid_has(hopper):
    """65535 blocks of 256 keys, in e4m3, where they are only moved."""
    seqlen = 65535 * 256 + 300
    v = torch.randint(0, 120, (1, seqlen, 1, 16), device=hopper, dtype=torch.uint8).view(E4M3)
    data, _ = torch.ops.cute_kernels.quantize_fp8_values(v)
    start = 65534 * 256
    wanted, _ = torch.ops.cute_kernels.quantize_fp8_values(v[:, start:].cpu())
    assert torch.equal(data[..., start:].cpu().view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("batch", "heads"), [(65536, 1), (70000, 2), (1, 70000)])
def test_more_batch_entries_and_heads_than_a_grid_has(hopper, batch, heads):
    q, k, v = random_qkv(hopper, torch.bfloat16, batch, 3, 5, heads)
    v[-1, 4, -1, 7] = 1e4  # quantised again
    out, lse = flash_attn_fp8_func(q, k, v, return_lse=True)
    exact, exact_lse = plain_attention(q, k, v, 0.125, False, torch.float32)
    error = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.square().mean().sqrt() < 0.08
    assert (lse - exact_lse).abs().max() < 0.3
