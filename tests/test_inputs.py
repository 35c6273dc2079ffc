"""Strides, odd pointers, empty tensors, and what is refused."""

import array
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import DTYPES, check, random_qkv, run, skip_unless_built
from torch._subclasses import FakeTensorMode

import cute_kernels
from cute_kernels import flash_attn_func, flash_attn_varlen_func
from cute_kernels.checks import ROWS_LIMIT

ROOT = Path(__file__).resolve().parent.parent


def surrounded(shape, dtype, device, view):
    """A `view` of a tensor of `shape`: random, and NaN all around it."""
    whole = torch.full(shape, math.nan, dtype=dtype, device=device)
    part = view(whole)
    part.copy_(torch.randn(part.shape, device=device))
    return part


def same(view):
    return lambda shape, dtype, device: tuple(
        surrounded(shape, dtype, device, view) for _ in range(3)
    )


def packed(shape, dtype, device):
    """q, k and v side by side in one tensor, as a projection gives them."""
    batch, seqlen, heads, head_dim = shape
    whole = torch.randn(batch, seqlen, 3, heads, head_dim, device=device).to(dtype)
    return whole.unbind(2)


def permuted(shape, dtype, device):
    batch, seqlen, heads, head_dim = shape
    whole = torch.randn(3, batch, heads, seqlen, head_dim, device=device).to(dtype)
    return whole.transpose(2, 3).unbind(0)


def seqlen_first(shape, dtype, device):
    batch, seqlen, heads, head_dim = shape
    whole = torch.randn(3, seqlen, batch, heads, head_dim, device=device).to(dtype)
    return whole.transpose(1, 2).unbind(0)


def expanded_batch(shape, dtype, device):
    batch, seqlen, heads, head_dim = shape
    whole = torch.randn(3, 1, seqlen, heads, head_dim, device=device).to(dtype)
    return whole.expand(3, batch, seqlen, heads, head_dim).unbind(0)


def expanded_heads(shape, dtype, device):
    """MQA written as MHA by expanding the one key head."""
    batch, seqlen, _, head_dim = shape
    q = torch.randn(shape, device=device).to(dtype)
    k, v = torch.randn(2, batch, seqlen, 1, head_dim, device=device).to(dtype)
    return q, k.expand(shape), v.expand(shape)


def mixed(shape, dtype, device):
    """Each argument in a layout of its own."""
    return (
        permuted(shape, dtype, device)[0],
        packed(shape, dtype, device)[1],
        seqlen_first(shape, dtype, device)[2],
    )


def only_element(shape, dtype, device):
    """Batch and heads of size 1 with strides that mean nothing and suit no TMA descriptor."""
    _, seqlen, _, head_dim = shape
    x = torch.randn(3, seqlen, head_dim, device=device).to(dtype)
    return tuple(t.as_strided((1, seqlen, 1, head_dim), (3, head_dim, 7, 1)) for t in x)


LAYOUTS = {
    "packed qkv": packed,
    "heads before seqlen": permuted,
    "seqlen first": seqlen_first,
    "expanded batch": expanded_batch,
    "expanded heads": expanded_heads,
    "mixed": mixed,
    "strides of size-1 dims": only_element,
    "every second head": lambda s, *a: same(lambda x: x[:, :, ::2])(
        (s[0], s[1], 2 * s[2], s[3]), *a
    ),
    "every third token": lambda s, *a: same(lambda x: x[:, 1::3])((s[0], 3 * s[1], s[2], s[3]), *a),
    "slice of batch": lambda s, *a: same(lambda x: x[1:-1])((s[0] + 2, *s[1:]), *a),
    "slice of seqlen": lambda s, *a: same(lambda x: x[:, 5:-9])((s[0], s[1] + 14, *s[2:]), *a),
    "slice of head_dim": lambda s, *a: same(lambda x: x[..., 8:-8])((*s[:3], s[3] + 16), *a),
    # The last two break TMA's rule of 16 bytes: by the pointer, and by the strides.
    "odd pointer": lambda s, *a: same(lambda x: x.flatten()[1 : 1 + math.prod(s)].view(s))(
        (math.prod(s) + 2,), *a
    ),
    "odd strides": lambda s, *a: same(lambda x: x[..., 1:-2])((*s[:3], s[3] + 3), *a),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_layouts(device, layout, causal):
    for dtype in DTYPES.values():
        if device == "cuda":
            skip_unless_built(dtype, 64, causal)
        for head_dim in (64, 40):
            torch.manual_seed(0)
            q, k, v = LAYOUTS[layout]((3, 150, 4, head_dim), dtype, device)
            out, lse = check(q, k, v, causal)
            if device == "cuda":  # layouts change nothing about the arithmetic
                dense = run(q.contiguous(), k.contiguous(), v.contiguous(), causal)
                assert torch.equal(out, dense[0])
                assert torch.equal(lse, dense[1])


def test_inputs_are_not_written(device):
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, causal=True)
    inputs = random_qkv(device, torch.bfloat16)
    copies = [t.clone() for t in inputs]
    run(*inputs, causal=True)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"seqlen_q": 0}, {"heads": 0}, {"batch": 0, "seqlen_k": 0}], ids=str
)
def test_empty_output(device, sizes):
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, causal=True)
    for causal in (False, True):
        out, lse = run(*random_qkv(device, torch.bfloat16, **sizes), causal)
        assert out.numel() == 0
        assert lse.numel() == 0


@pytest.mark.parametrize("causal", [False, True])
def test_no_keys(device, causal):
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, causal)
    out, lse = run(*random_qkv(device, torch.bfloat16, seqlen_q=200, seqlen_k=0), causal)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_values_beside_the_keys_reach_nothing(device):
    """NaN keys and values that the causal mask hides, inside blocks that are read."""
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, causal=True)
    q, k, v = random_qkv(device, torch.bfloat16, 1, 100, 100, 2)
    expected, expected_lse = run(q[:, :60], k[:, :60], v[:, :60], causal=True)
    k[:, 60:], v[:, 60:] = math.inf, 1e30
    out, lse = run(q, k, v, causal=True)
    assert torch.allclose(out[:, :60].float(), expected.float(), atol=1e-2)
    assert torch.allclose(lse[:, :, :60], expected_lse, atol=1e-4)


# What is changed about a good call, the kind of error on the CPU, and words of the message.
BAD = {
    "q of rank 3": (
        lambda q, k, v: {"q": q[0]},
        ValueError,
        r"\bq has shape .*4 dimensions",
    ),
    "v of rank 5": (
        lambda q, k, v: {"v": v[None]},
        ValueError,
        r"\bv has shape .*4 dimensions",
    ),
    "q int32": (
        lambda q, k, v: {"q": q.int()},
        TypeError,
        r"\bq has dtype .*must be float16",
    ),
    "k of another dtype": (
        lambda q, k, v: {"k": k.half()},
        TypeError,
        r"\bk has dtype .*like q",
    ),
    "head_dim 12": (
        lambda q, k, v: {"q": q[..., :12], "k": k[..., :12], "v": v[..., :12]},
        ValueError,
        r"\bq has head_dim 12, must be a multiple of 8",
    ),
    "head_dim 264": (
        lambda q, k, v: {n: t.repeat(1, 1, 1, 5)[..., :264] for n, t in (("q", q), ("k", k))},
        ValueError,
        r"\bq has head_dim 264, must be .*256",
    ),
    "head_dim 0": (
        lambda q, k, v: {"q": q[..., :0], "k": k[..., :0], "v": v[..., :0]},
        ValueError,
        r"\bq has head_dim 0, must be",
    ),
    "k of another head_dim": (
        lambda q, k, v: {"k": k[..., :32]},
        ValueError,
        r"\bk has head_dim 32, must be 64 like q",
    ),
    "v's head_dim 28": (
        lambda q, k, v: {"v": v[..., :28]},
        ValueError,
        r"\bv has head_dim 28, must be a multiple of 8",
    ),
    "k of another batch": (
        lambda q, k, v: {"k": k[:1]},
        ValueError,
        r"\bk has batch 1, must be 2 like q",
    ),
    "v of another batch": (
        lambda q, k, v: {"v": v[:1]},
        ValueError,
        r"\bv has batch 1, must be 2 like q",
    ),
    "v of another seqlen": (
        lambda q, k, v: {"v": v[:, 1:]},
        ValueError,
        r"\bv has seqlen 31, must be 32 like k",
    ),
    "v of other heads": (
        lambda q, k, v: {"v": v[:, :, :1]},
        ValueError,
        r"\bv has 1 heads, must have 2 like k",
    ),
    "heads that do not divide": (
        lambda q, k, v: {"q": q[:, :, :3]},
        ValueError,
        r"\bq has 3 heads, must be a multiple of k's 2",
    ),
    "no key heads": (
        lambda q, k, v: {"k": k[:, :, :0], "v": v[:, :, :0]},
        ValueError,
        r"\bq has 4 heads, must be a multiple of k's 0",
    ),
    "q strided in head_dim": (
        lambda q, k, v: {"q": q.repeat(1, 1, 1, 2)[..., ::2]},
        ValueError,
        r"\bq has strides .*contiguous",
    ),
    "v strided in head_dim": (
        lambda q, k, v: {"v": v.transpose(1, 3).contiguous().transpose(1, 3)},
        ValueError,
        r"\bv has strides .*contiguous",
    ),
    "scale nan": (
        lambda q, k, v: {"softmax_scale": math.nan},
        ValueError,
        "softmax_scale is nan, must be finite",
    ),
    "scale inf": (
        lambda q, k, v: {"softmax_scale": math.inf},
        ValueError,
        "softmax_scale is inf, must be finite",
    ),
    "scale 0": (
        lambda q, k, v: {"softmax_scale": 0.0},
        ValueError,
        "softmax_scale is 0.*greater than 0",
    ),
    "scale negative": (
        lambda q, k, v: {"softmax_scale": -0.1},
        ValueError,
        r"softmax_scale is -0\.1.*greater than 0",
    ),
    "scale beyond float32": (
        lambda q, k, v: {"softmax_scale": 1e39},
        ValueError,
        r"softmax_scale is 1e\+39, must be at most 3\.4",
    ),
    "scale not a number": (
        lambda q, k, v: {"softmax_scale": "0.1"},
        TypeError,
        "softmax_scale is '0.1', must be a number",
    ),
    "causal not a flag": (
        lambda q, k, v: {"causal": "yes"},
        TypeError,
        "causal is 'yes', must be True or False",
    ),
    "no such tile": (
        lambda q, k, v: {"tile_config": "no such"},
        ValueError,
        r"tile_config is 'no such', must be None \(automatic\) or the name of a forward row",
    ),
    "a backward row": (
        lambda q, k, v: {"tile_config": "bf16_d64_bwd_no_such"},
        ValueError,
        "tile_config is 'bf16_d64_bwd_no_such', must be None",
    ),
    "an empty tile": (lambda q, k, v: {"tile_config": ""}, ValueError, "tile_config is '', must"),
    "index of a tile": (
        lambda q, k, v: {"tile_config": 0},
        TypeError,
        r"tile_config is 0, must be None \(automatic\) or the name of a forward row",
    ),
    "q not a tensor": (
        lambda q, k, v: {"q": q.tolist()},
        TypeError,
        r"\bq is a list, must be a torch\.Tensor",
    ),
    "k not a tensor": (
        lambda q, k, v: {"k": None},
        TypeError,
        r"\bk is a NoneType, must be a torch\.Tensor",
    ),
    "v not a tensor": (
        lambda q, k, v: {"v": array.array("f", v.flatten().tolist())},
        TypeError,
        r"\bv is a array, must be a torch\.Tensor",
    ),
    "sm_margin of more than 64 bits": (
        lambda q, k, v: {"sm_margin": 2**63},
        ValueError,
        r"\bsm_margin is 9223372036854775808, must be an int of 64 bits",
    ),
}


def good_and_bad_call(bad, device):
    change, error, message = BAD[bad]
    q, k, v = random_qkv(device, torch.bfloat16, 2, 24, 32, 4, 2)
    good = {"q": q, "k": k, "v": v}
    return good, {**good, **change(q, k, v)}, error, message


@pytest.mark.parametrize("scale", [5e-39, 1e-50, 5e-324])
@pytest.mark.parametrize("causal", [False, True])
def test_the_smallest_scales_give_the_mean_of_what_is_seen(device, causal, scale):
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, causal)
    q, k, v = random_qkv(device, torch.bfloat16, 2, 70, 70, 2)
    out, lse = run(q, k, v, causal, softmax_scale=scale)
    seen = torch.arange(1, 71, device=device) if causal else torch.full((70,), 70, device=device)
    mean = (v.double().cumsum(1) if causal else v.double().sum(1, keepdim=True)) / seen.view(
        -1, 1, 1
    )
    assert (out - mean).abs().max() <= 2e-2
    assert (lse - seen.log()).abs().max() <= 1e-5


@pytest.mark.parametrize("bad", BAD)
def test_refused(device, bad):
    good, changed, error, message = good_and_bad_call(bad, device)
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, causal=False)
    assert flash_attn_func(**good).isfinite().all()
    with pytest.raises(error, match=message):
        flash_attn_func(**changed)


@pytest.mark.parametrize("bad", BAD)
def test_shape_inference_refuses_the_same_for_cuda(bad):
    def on_cuda(argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        return torch.empty_strided(
            argument.shape, argument.stride(), dtype=argument.dtype, device="cuda"
        )

    good, changed, error, message = good_and_bad_call(bad, "cpu")
    with FakeTensorMode():  # needs no GPU
        good, changed = ({n: on_cuda(t) for n, t in call.items()} for call in (good, changed))
        assert flash_attn_func(**good).device.type == "cuda"
        with pytest.raises(error, match=message):
            flash_attn_func(**changed)


@pytest.mark.parametrize("queries", [1, 2**30, ROWS_LIMIT - 2])
def test_more_rows_than_kernels_count(queries):
    with FakeTensorMode():  # needs no GPU
        starts = torch.empty(2, device="cuda", dtype=torch.int32)
        for keys in (ROWS_LIMIT - queries - 1, ROWS_LIMIT - queries):
            for layout, call in (
                ((1,), lambda q, k: flash_attn_func(q, k, k)),
                ((), lambda q, k: flash_attn_varlen_func(q, k, k, starts, starts)),
            ):
                q, k = (
                    torch.empty(*layout, n, 1, 8, device="cuda", dtype=torch.half)
                    for n in (queries, keys)
                )
                if queries + keys < ROWS_LIMIT:
                    call(q, k)
                    continue
                message = rf"^q has (seqlen|total) {queries} and k {keys}, together they must be"
                with pytest.raises(ValueError, match=message):
                    call(q, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_for_the_cpu(hopper, dtype):
    q, k, v = random_qkv(hopper, dtype)
    with pytest.raises(TypeError, match=r"q has dtype .*must be float16 or bfloat16"):
        flash_attn_func(q, k, v)


@pytest.mark.parametrize("names", ["q", "k", "v", "qk", "kv"])
def test_mixed_devices(hopper, names):
    arguments = dict(zip("qkv", random_qkv(hopper, torch.bfloat16), strict=True))
    arguments.update({name: arguments[name].cpu() for name in names})
    with pytest.raises(ValueError, match=r"\b[qkv] is on (cpu|cuda:0), must be on"):
        flash_attn_func(**arguments)


def test_mixed_devices_in_shape_inference():
    with FakeTensorMode():
        q, k = (torch.empty(1, 8, 2, 64, device=d, dtype=torch.half) for d in ("cuda", "cpu"))
        with pytest.raises(ValueError, match="k is on cpu, must be on cuda:0 like q"):
            flash_attn_func(q, k, k)


LATER = {
    "qv": torch.zeros(1),
}


@pytest.mark.parametrize("name", LATER)
def test_later_arguments_are_named(name):
    q, k, v = random_qkv("cpu", torch.bfloat16)
    with pytest.raises(NotImplementedError, match=rf"\b{name}\b"):
        flash_attn_func(q, k, v, **{name: LATER[name]})


def test_arguments_that_ask_for_nothing():
    """FlashAttention-3's defaults by position, and values that mean the same."""
    q, k, v = random_qkv("cpu", torch.bfloat16)
    expected = flash_attn_func(q, k, v, causal=True)
    harmless = (None, None, None, None, (-1, -1), 0, 0.0, 1, None, False, 0, False)
    for out in (
        flash_attn_func(q, k, v, 64**-0.5, True, *harmless),
        flash_attn_func(q, k, v, causal=True, window_size=[-1, -1], num_splits=0, pack_gqa=False),
        flash_attn_func(q, k, v, causal=True, num_splits=4, pack_gqa=True, sm_margin=8),
        flash_attn_func(q, k, v, causal=True, deterministic=True),
    ):
        assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_named():
    nested = torch.nested.nested_tensor([torch.zeros(3, 4, 16), torch.zeros(5, 4, 16)])
    with pytest.raises(TypeError, match=r"^q is a nested tensor, must be one of a single shape$"):
        flash_attn_func(nested, nested, nested)


def test_unknown_tile_config_is_told_which_there_are():
    q, k, v = random_qkv("cpu", torch.bfloat16)
    for row in cute_kernels.tile_configs("forward"):
        with pytest.raises(ValueError, match=rf"tile_config is 'no such'.*\b{row['name']}\b"):
            flash_attn_func(q, k, v, tile_config="no such")


def test_tile_config_that_does_not_fit(hopper):
    row = min(cute_kernels.tile_configs("forward"), key=lambda row: row["head_dim"])
    if row["head_dim"] == 256:
        pytest.skip("every kernel of this build takes every head dim")
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], head_dim=row["head_dim"] + 8)
    with pytest.raises(ValueError, match=rf"tile_config .*{row['name']}.*head_dim up to"):
        flash_attn_func(q, k, v, tile_config=row["name"])
    other = "fp16" if row["dtype"] == "bf16" else "bf16"
    q, k, v = random_qkv(hopper, DTYPES[other], head_dim=row["head_dim"])
    with pytest.raises(ValueError, match=rf"tile_config .*{row['name']}.*takes {row['dtype']}"):
        flash_attn_func(q, k, v, tile_config=row["name"])


def test_tile_config_on_the_cpu_is_only_looked_up():
    q, k, v = random_qkv("cpu", torch.bfloat16)
    expected = flash_attn_func(q, k, v)
    for row in cute_kernels.tile_configs("forward"):
        assert torch.equal(flash_attn_func(q, k, v, tile_config=row["name"]), expected)


def test_tile_configs_are_copies():
    rows = cute_kernels.tile_configs()
    assert rows
    assert len({row["name"] for row in rows}) == len(rows)
    passes = ("forward", "backward", "forward_fp8", "decode", "decode_fp8", "prefill", "latent")
    by_pass = [cute_kernels.tile_configs(name) for name in passes]
    assert rows == [row for part in by_pass for row in part]
    assert all(row["tile_m"] == 64 * row["consumer_warpgroups"] for row in by_pass[0])
    rows[0]["name"] = "changed"
    assert cute_kernels.tile_configs()[0]["name"] != "changed"


def test_another_gpu_is_told_what_is_needed():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that is not a Hopper: PyTorch sees no GPU here")
    capability = torch.cuda.get_device_capability()
    if capability == (9, 0):
        pytest.skip("needs a GPU that is not a Hopper: this one is")
    q, k, v = random_qkv("cuda", torch.float16)
    found = f"{capability[0]}.{capability[1]}"
    with pytest.raises(RuntimeError, match=rf"compute capability 9\.0.*has {found}"):
        flash_attn_func(q, k, v)


def test_headers_are_installed():
    include = Path(cute_kernels.get_include())
    header = include / "cute_kernels" / "attention" / "forward" / "mainloop.hpp"
    assert header.is_file()


def test_unbuilt_package_says_how_to_build():
    """The source folder on the path instead of an installation."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import cute_kernels"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *sys.path])},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "ImportError: cute_kernels._C is not built" in done.stderr
    assert "pip install" in done.stderr
