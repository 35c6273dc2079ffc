"""torch.func's transforms of flash_attn_func: right, or an error, never silently wrong."""

import math

import pytest
import torch
from parity import plain_attention, random_qkv, skip_unless_built
from torch import func
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from cute_kernels import flash_attn_func
from cute_kernels.operators import flash_attn_backward, flash_attn_forward

MAPPED = 3
IN_DIMS = [(0, 0, 0), (1, 2, -2), (0, None, None), (None, 1, None), (None, None, 0), (-1, 0, None)]
ALL = (0, 1, 2)


@pytest.fixture
def dtype(device):
    if device == "cpu":
        return torch.float64
    skip_unless_built(torch.bfloat16, 64, causal=True)
    skip_unless_built(torch.bfloat16, 64, causal=True, of_pass="backward")
    return torch.bfloat16


def inputs_for(device, dtype, in_dims=(None, None, None), batch=2):
    """q, k and v, with MAPPED of them side by side where in_dims says so."""
    shapes = {"seqlen_q": 20, "seqlen_k": 30, "heads": 4, "key_heads": 2, "head_dim": 64}
    if batch != 2:
        shapes.update(seqlen_q=3, seqlen_k=4, head_dim=8)
    calls = [random_qkv(device, dtype, batch, **shapes, seed=seed) for seed in range(MAPPED)]
    return [
        calls[0][i] if dim is None else torch.stack([call[i] for call in calls], dim)
        for i, dim in enumerate(in_dims)
    ]


def ours(q, k, v):
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    return out, lse


def plain(q, k, v):
    return plain_attention(q, k, v, q.shape[-1] ** -0.5, True, q.dtype)


def loss_of(attention):
    def loss(q, k, v):
        out, lse = attention(q, k, v)
        return out.float().sin().sum() + lse.float().cos().sum()

    return loss


def assert_same(transformed, *inputs):
    """transformed(ours) of the inputs is transformed(plain) of them, up to rounding."""
    wide = [x.double() for x in inputs]
    expected = torch.utils._pytree.tree_leaves(transformed(plain)(*wide))
    actual = torch.utils._pytree.tree_leaves(transformed(ours)(*inputs))
    tolerance = 2e-2 if inputs[0].dtype == torch.bfloat16 else 1e-6
    for result, right in zip(actual, expected, strict=True):
        assert result.shape == right.shape
        error = (result.double() - right).abs().max() if right.numel() else torch.zeros(())
        assert error <= tolerance * max(1.0, right.abs().max().item() if right.numel() else 0.0)


def test_gradients(device, dtype):
    assert_same(lambda f: func.grad(loss_of(f), ALL), *inputs_for(device, dtype))


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_vjp(device, dtype, grad_enabled):
    def pulled_back(attention):
        def run(*inputs):
            (out, lse), pull_back = func.vjp(attention, *inputs)
            with torch.set_grad_enabled(grad_enabled):
                return out, pull_back((torch.cos(out), torch.sin(lse)))

        return run

    assert_same(pulled_back, *inputs_for(device, dtype))


def test_jacobian(device, dtype):
    assert_same(lambda f: func.jacrev(f, ALL), *inputs_for(device, dtype, batch=1))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(device, dtype, in_dims):
    assert_same(lambda f: func.vmap(f, in_dims), *inputs_for(device, dtype, in_dims))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_gradients_of_each_sample(device, dtype, in_dims):
    inputs = inputs_for(device, dtype, in_dims)
    assert_same(lambda f: func.vmap(func.grad(loss_of(f), ALL), in_dims), *inputs)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_gradients_through_vmap(device, dtype, in_dims):
    """A tensor that all mapped calls share has the sum of their gradients."""

    def summed(attention):
        return lambda *inputs: func.vmap(loss_of(attention), in_dims)(*inputs).sum()

    def eager(attention):
        def run(*inputs):
            leaves = [x.detach().requires_grad_() for x in inputs]
            return torch.autograd.grad(summed(attention)(*leaves), leaves)

        return run

    inputs = inputs_for(device, dtype, in_dims)
    assert_same(lambda f: func.grad(summed(f), ALL), *inputs)
    assert_same(eager, *inputs)


def test_vmap_of_vmap(device, dtype):
    q, k, v = inputs_for(device, dtype, (0, 0, 0))
    q, v = torch.stack([q, -q], 2), torch.stack([v, 2 * v], 0)
    inner = (0, 0, 0)
    assert_same(lambda f: func.vmap(func.vmap(f, inner), (2, None, 0)), q, k, v)


def test_vmap_in_chunks_and_over_nothing(device, dtype):
    q, k, v = inputs_for(device, dtype, (0, 0, 0))
    assert_same(lambda f: func.vmap(f, chunk_size=2), q, k, v)
    out, lse = func.vmap(ours, (0, 0, None))(q[:0], k[:0], v[0])
    assert out.shape == (0, *q.shape[1:])
    assert lse.shape == (0, q.shape[1], q.shape[3], q.shape[2])


def test_vmap_over_calls_without_keys_or_queries(device, dtype):
    q, k, v = inputs_for(device, dtype, (0, 0, 0))
    out, lse = func.vmap(ours)(q, k[:, :, :0], v[:, :, :0])
    assert not out.any()
    assert (lse == -math.inf).all()
    out, _ = func.vmap(ours)(q[:, :, :0], k, v)
    assert out.shape == (MAPPED, 2, 0, 4, 64)


def test_operators_have_the_rule_too(device, dtype):
    q, k, v = inputs_for(device, dtype, (0, 0, 0))

    def forward_and_backward(q, k, v):
        out, lse = flash_attn_forward(q, k, v, 0.1, True)
        return flash_attn_backward(out, None, q, k, v, out, lse, 0.1, True, True)

    mapped = func.vmap(forward_and_backward, (0, None, 0))(q, k[0], v)
    for i in range(MAPPED):
        one = forward_and_backward(q[i], k[0], v[i])
        for result, right in zip(mapped, one, strict=True):
            torch.testing.assert_close(result[i], right)


class Layer(torch.nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.project = torch.nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return flash_attn_func(q, k, v, causal=True).flatten(-2)


def test_per_sample_gradients_of_a_layer(device, dtype):
    """vmap(grad(functional_call)), as differential privacy and influence functions have it."""
    torch.manual_seed(0)
    layer = Layer(128).to(device, dtype)
    parameters = dict(layer.named_parameters())
    samples = torch.randn(4, 17, 128, device=device, dtype=dtype)

    def loss(parameters, sample):
        return func.functional_call(layer, parameters, sample[None]).float().square().sum()

    mapped = func.vmap(func.grad(loss), (None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        right = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for (name, grads), expected in zip(mapped.items(), right, strict=True):
            allowed = expected.abs().max() * (2e-2 if dtype == torch.bfloat16 else 1e-9)
            assert (grads[i] - expected).abs().max() <= allowed, name


# What is refused


def test_second_derivatives_are_refused(device, dtype):
    inputs = inputs_for(device, dtype)
    first = func.grad(loss_of(ours))
    with pytest.raises(NotImplementedError, match="second derivative"):
        func.grad(lambda *inputs: first(*inputs).sum())(*inputs)


FORWARD_MODE = {
    "jvp": lambda *qkv: func.jvp(ours, qkv, qkv),
    "jvp in v": lambda q, k, v: func.jvp(lambda v: ours(q, k, v), (v,), (v,)),
    "jvp without gradients": lambda *qkv: torch.no_grad()(func.jvp)(ours, qkv, qkv),
    "linearize": lambda *qkv: func.linearize(ours, *qkv),
    "jacfwd": lambda *qkv: func.jacfwd(ours)(*qkv),
    "hessian": lambda *qkv: func.hessian(loss_of(ours))(*qkv),
    "jvp of vmap": lambda *qkv: func.jvp(
        func.vmap(ours), tuple(x[None] for x in qkv), tuple(x[None] for x in qkv)
    ),
    "jvp of grad": lambda *qkv: func.jvp(func.grad(loss_of(ours)), qkv, qkv),
    "vmap of jvp": lambda *qkv: func.vmap(lambda *one: func.jvp(ours, one, one))(
        *(x[None] for x in qkv)
    ),
    "compiled jvp": lambda *qkv: torch.compile(
        lambda *qkv: func.jvp(ours, qkv, qkv), backend="aot_eager"
    )(*qkv),
}


@pytest.mark.parametrize("what", FORWARD_MODE)
def test_forward_mode_is_refused(device, dtype, what):
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        FORWARD_MODE[what](*inputs_for(device, dtype))


@pytest.mark.parametrize("place", ALL)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_are_refused(device, dtype, place, requires_grad):
    inputs = [x.requires_grad_(requires_grad) for x in inputs_for(device, dtype)]
    with forward_ad.dual_level():
        expected = flash_attn_func(*inputs)  # nothing has a tangent yet
        inputs[place] = forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place]))
        for grad_enabled in (True, False):
            with (
                torch.set_grad_enabled(grad_enabled),
                pytest.raises(NotImplementedError, match="no forward-mode derivatives"),
            ):
                flash_attn_func(*inputs)
    assert torch.equal(flash_attn_func(*inputs), expected)


def test_dual_gradients_are_refused(device, dtype):
    q, k, v = inputs_for(device, dtype)
    out = flash_attn_func(q.requires_grad_(), k, v)
    with forward_ad.dual_level():
        grad_out = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.autograd.grad(out, q, grad_out)


def test_dual_tensors_are_refused_in_compiled_code():
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_func, backend="aot_eager")
    q, k, v = inputs_for("cpu", torch.float64)
    expected = compiled(q, k, v)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            compiled(forward_ad.make_dual(q, q), k, v)
        assert torch.equal(compiled(q, k, v), expected)


BAD = {
    "rank": (lambda q, k, v: (q[:, 0], k, v), ValueError, r"q has shape \(20, 4, 64\), must have"),
    "batch": (lambda q, k, v: (q, k[:, :1], v), ValueError, "k has batch 1, must be 2 like q"),
    "dtype": (lambda q, k, v: (q, k, v.float()), TypeError, "v has dtype torch.float32, must be"),
    "heads": (lambda q, k, v: (q[..., :3, :], k, v), ValueError, "q has 3 heads, must be a mul"),
}


@pytest.mark.parametrize("bad", BAD)
def test_errors_are_those_of_one_call(device, dtype, bad):
    change, error, message = BAD[bad]
    inputs = change(*inputs_for(device, dtype, (0, 0, 0)))
    for transformed in (ours, func.grad(loss_of(ours))):
        with pytest.raises(error, match=message):
            func.vmap(transformed)(*inputs)


# Beside compilers and tracers


@pytest.mark.parametrize("in_dims", IN_DIMS[:3], ids=str)
def test_compiled_code_falls_back_to_what_is_right(in_dims):
    def compiled(attention):
        torch._dynamo.reset()
        transformed = func.vmap(func.grad(loss_of(attention), ALL), in_dims)
        return torch.compile(transformed, backend="aot_eager")

    assert_same(compiled, *inputs_for("cpu", torch.float64, in_dims))


def test_compiled_function_inside_a_transform():
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    inputs = inputs_for("cpu", torch.float64)
    assert_same(lambda f: func.grad(loss_of(compiled if f is ours else f), ALL), *inputs)


def test_tracing_records_the_operators():
    q, k, v = inputs_for("cpu", torch.float64)
    gradient = func.grad(loss_of(ours))
    graph = make_fx(lambda q, k, v: gradient(q, k, v))(q, k, v)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(flash_attn_forward) == targets.count(flash_attn_backward) == 1
    torch.testing.assert_close(graph(q, k, v), gradient(q, k, v))


def test_functionalize():
    inputs = inputs_for("cpu", torch.float64)
    for result, right in zip(func.functionalize(ours)(*inputs), ours(*inputs), strict=True):
        assert torch.equal(result, right)
