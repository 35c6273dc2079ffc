"""The operator in PyTorch's machinery: schema, shapes, autograd, compile, graphs, streams."""

import subprocess
import sys

import pytest
import torch
from parity import check, random_qkv, run, skip_unless_built
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from cute_kernels import flash_attn_func, tile_configs
from cute_kernels.operators import flash_attn_backward, flash_attn_forward

OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def permuted_qkv(*args, **kwargs):
    """As random_qkv, in memory ordered (batch, heads, seqlen, head_dim)."""
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in random_qkv(*args, **kwargs)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("make", [random_qkv, permuted_qkv])
def test_opcheck_cpu(make, requires_grad, causal):
    q, k, v = make("cpu", torch.float32, 2, 20, 30, 4, 2, head_dim=16)
    for tensor in (q, k, v):
        tensor.requires_grad_(requires_grad)
    result = torch.library.opcheck(flash_attn_forward, (q, k, v, 0.3, causal), test_utils=OPCHECK)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("make", [random_qkv, permuted_qkv])
def test_opcheck_cuda(hopper, make, causal):
    skip_unless_built(torch.bfloat16, 64, causal)
    q, k, v = make(hopper, torch.bfloat16, 2, 100, 130, 4, 2)
    result = torch.library.opcheck(flash_attn_forward, (q, k, v, 0.3, causal), test_utils=OPCHECK)
    assert set(result.values()) == {"SUCCESS"}


def form(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@pytest.mark.parametrize("sizes", [{}, {"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}], ids=str)
def test_shape_inference_is_what_is_allocated(device, sizes):
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, causal=False)
    q, k, v = permuted_qkv(device, torch.bfloat16, heads=6, key_heads=3, **sizes)
    real = run(q, k, v)
    with FakeTensorMode() as mode:
        fake = flash_attn_func(*(mode.from_tensor(t) for t in (q, k, v)), return_lse=True)
    assert [form(t) for t in fake] == [form(t) for t in real]


@pytest.mark.parametrize("sizes", [{}, {"seqlen_q": 0}, {"seqlen_k": 0}], ids=str)
def test_shape_inference_of_gradients_is_what_is_allocated(sizes):
    q, k, v = permuted_qkv("cpu", torch.float32, heads=6, key_heads=3, **sizes)
    out, lse = run(q, k, v)
    inputs = (torch.ones_like(out), None, q, k, v, out, lse, 0.3, True, False)
    real = flash_attn_backward(*inputs)
    with FakeTensorMode() as mode:
        fake = flash_attn_backward(
            *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs)
        )
    assert [form(t) for t in fake] == [form(t) for t in real]


def test_shape_inference_for_cuda_without_a_gpu():
    with FakeTensorMode():
        q = torch.empty(2, 7, 6, 72, device="cuda", dtype=torch.half)
        k = torch.empty(2, 9, 3, 72, device="cuda", dtype=torch.half)
        out, lse = flash_attn_func(q, k, k, return_lse=True)
    device = torch.device("cuda:0")
    assert form(out) == ((2, 7, 6, 72), (3024, 432, 72, 1), torch.half, device)
    assert form(lse) == ((2, 6, 7), (42, 7, 1), torch.float32, device)


def test_meta_device():
    q = torch.empty(2, 7, 6, 72, device="meta", dtype=torch.half)
    assert form(flash_attn_func(q, q, q)) == form(q)


def attention_between(x, y, causal):
    """What a compiler may move and fuse around the operator."""
    q, k, v = x.sin(), y * 2, y + 1
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    return out.square().sum() + lse.sin().sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_gradients(backend):
    torch._dynamo.reset()
    compiled = torch.compile(attention_between, backend=backend, fullgraph=True, dynamic=False)
    x, y, _ = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, head_dim=16)
    results = []
    for function in (attention_between, compiled):
        inputs = [t.clone().requires_grad_() for t in (x, y)]
        loss = function(*inputs, causal=True)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiles_with_dynamic_shapes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_between, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for seqlen_q, seqlen_k in [(20, 30), (25, 31), (300, 310)]:
        x, y, _ = random_qkv("cpu", torch.float32, 2, seqlen_q, seqlen_k, 4, 2, head_dim=16)
        torch.testing.assert_close(compiled(x, y, True), attention_between(x, y, True))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # those of the first call


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_on_cuda(hopper, causal):
    skip_unless_built(torch.bfloat16, 64, causal)
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, 100, 130, 4, 2)
    assert torch.equal(compiled(q, k, v, causal=causal), flash_attn_func(q, k, v, causal=causal))


def test_export_keeps_the_operator():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True)

    inputs = tuple(random_qkv("cpu", torch.bfloat16))
    program = torch.export.export(Attention(), inputs)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert flash_attn_forward in targets
    assert torch.equal(program.module()(*inputs), flash_attn_func(*inputs, causal=True))


def test_compiled_and_exported_programs_name_their_tile(tmp_path):
    """A name means the same in every build; an index would not."""
    row = tile_configs("forward")[-1]["name"]

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, tile_config=row)

    inputs = tuple(random_qkv("cpu", torch.bfloat16))
    expected = flash_attn_func(*inputs)
    torch.export.save(torch.export.export(Attention(), inputs), tmp_path / "attention.pt2")
    program = torch.export.load(tmp_path / "attention.pt2")
    (node,) = (node for node in program.graph.nodes if node.target is flash_attn_forward)
    assert row in node.args
    assert torch.equal(program.module()(*inputs), expected)
    torch._dynamo.reset()
    compiled = torch.compile(Attention(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), expected)


def test_gradient_flows_only_where_it_is_asked_for():
    q, k, v = random_qkv("cpu", torch.float32)
    assert not flash_attn_func(q, k, v).requires_grad
    for tensor in (q, k, v):
        tensor.requires_grad_()
        out = flash_attn_func(q, k, v)
        assert out.requires_grad
        out.sum().backward()
        assert tensor.grad.abs().max() > 0
        with torch.no_grad():
            assert not flash_attn_func(q, k, v).requires_grad
        with torch.inference_mode():
            assert flash_attn_func(q, k, v).is_inference()
        tensor.requires_grad_(False)


def test_operator_called_directly_has_the_gradient_too():
    q, k, v = (t.requires_grad_() for t in random_qkv("cpu", torch.float32))
    out, lse = torch.ops.cute_kernels.flash_attn_forward(q, k, v, 0.1, True)
    direct = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    out, lse = flash_attn_func(q, k, v, 0.1, True, return_lse=True)
    for a, b in zip(direct, torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)), strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_the_precision_alone():
    q, k, v = (t.requires_grad_() for t in random_qkv("cpu", torch.float32))
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = flash_attn_func(q, k, v)
            grads.append((out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_graph_replay_with_changed_inputs(hopper):
    skip_unless_built(torch.bfloat16, 64, causal=True)
    sizes = {"batch": 2, "seqlen_q": 333, "seqlen_k": 500, "heads": 6, "key_heads": 2}
    static = random_qkv(hopper, torch.bfloat16, **sizes)
    flash_attn_func(*static)  # everything that happens once has happened
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_attn_func(*static, causal=True, return_lse=True)
    for seed in (1, 2, 3):
        fresh = random_qkv(hopper, torch.bfloat16, **sizes, seed=seed)
        expected = run(*fresh, causal=True)
        for tensor, value in zip(static, fresh, strict=True):
            tensor.copy_(value)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


FIRST_CALL = """
import torch
from cute_kernels import flash_attn_func, tile_configs

row = tile_configs("forward")[0]
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[row["dtype"]]
q, k, v = torch.randn(3, 2, 300, 4, row["head_dim"], device="cuda", dtype=dtype)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = flash_attn_func(q, k, v, tile_config=row["name"])
graph.replay()
assert torch.equal(out, flash_attn_func(q, k, v, tile_config=row["name"]))
print("same")
"""


def test_first_call_of_a_process_can_be_captured(hopper):
    """Nothing that a capture forbids happens lazily."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


def test_two_streams_at_once(hopper):
    skip_unless_built(torch.bfloat16, 64, causal=True)
    problems = [
        random_qkv(hopper, torch.bfloat16, 2, 500 + i, 777 - i, 8, 2, seed=i) for i in range(2)
    ]
    expected = [flash_attn_func(*problem, causal=True) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = [[], []]
    for _ in range(50):
        for stream, problem, outs in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                outs.append(flash_attn_func(*problem, causal=True))
    torch.cuda.synchronize()
    for outs, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for out in outs)


def test_runs_on_the_current_stream_without_waiting(hopper):
    skip_unless_built(torch.bfloat16, 64, causal=False)
    q, k, v = random_qkv(hopper, torch.bfloat16)
    new_q = random_qkv(hopper, torch.bfloat16, seed=1)[0]
    expected = flash_attn_func(new_q, k, v)
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # clocks, so about half a second
        q.copy_(new_q)
        out = flash_attn_func(q, k, v)  # on another stream it would read the old q
        done.record()
    assert not done.query()  # the call came back before the GPU was done with it
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_one_launch_a_call(hopper):
    skip_unless_built(torch.bfloat16, 64, causal=True)
    inputs = random_qkv(hopper, torch.bfloat16)
    flash_attn_func(*inputs, causal=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            flash_attn_func(*inputs, causal=True)
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not on_gpu:
        pytest.skip("the profiler records no GPU activity here")
    assert len(on_gpu) == 3
    assert all("forward_kernel" in name for name in on_gpu)


def test_device_that_is_not_the_current_one(hopper):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if torch.cuda.get_device_capability(1) != (9, 0):
        pytest.skip("needs a second Hopper GPU")
    skip_unless_built(torch.bfloat16, 64, causal=True)
    q, k, v = random_qkv("cuda:1", torch.bfloat16)
    out, _ = check(q, k, v, causal=True)
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
