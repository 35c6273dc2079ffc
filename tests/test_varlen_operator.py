"""The varlen operators in PyTorch's machinery: schema, shapes, autograd, compile, transforms."""

import random

import pytest
import torch
from packed import Packed, assert_packed_right, random_grads, random_packed
from parity import skip_unless_answered
from torch import func
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cute_kernels import flash_attn_varlen_func, varlen
from cute_kernels.operators import flash_attn_varlen_backward, flash_attn_varlen_forward

OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def small(seed=0, dtype=torch.float32, device="cpu", batch=3):
    chance = random.Random(seed)
    slots = [[chance.randint(0, 20) for _ in range(batch)] for _ in range(2)]
    return random_packed(chance, device, dtype, *slots, (16, 24), (4, 2), True, tail=3)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"max_seqlen_q": 20, "max_seqlen_k": 20, "deterministic": True}, {"window_left": 4}],
    ids=str,
)
@pytest.mark.parametrize("with_lengths", [False, True])
def test_opcheck(with_lengths, keywords, requires_grad):
    packed = small()
    inputs = [x.requires_grad_(requires_grad) for x in packed.qkv]
    lengths = [*packed.lengths().values(), torch.tensor([0, 3, -2], dtype=torch.int32)]
    if not with_lengths:
        lengths[2:] = [None] * 3
    arguments = (*inputs, *lengths, 0.3, True)
    result = torch.library.opcheck(
        flash_attn_varlen_forward, arguments, keywords, test_utils=OPCHECK
    )
    assert set(result.values()) == {"SUCCESS"}
    if not requires_grad:
        out, lse = flash_attn_varlen_forward(*arguments, **keywords)
        grads = random_grads(packed)
        arguments = (*grads, *inputs, out, lse, *lengths, 0.3, True)
        result = torch.library.opcheck(
            flash_attn_varlen_backward, arguments, keywords, test_utils=OPCHECK
        )
        assert set(result.values()) == {"SUCCESS"}


def form(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@pytest.mark.parametrize("batch", [0, 3])
def test_shape_inference_is_what_is_allocated(device, batch):
    skip_unless_answered(device, torch.bfloat16)
    packed = small(dtype=torch.bfloat16, device=device, batch=batch)
    real = packed.gradients(*random_grads(packed))
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x.requires_grad_()) for x in packed.qkv)
        lengths = {
            name: x if x is None else mode.from_tensor(x) for name, x in packed.lengths().items()
        }
        out, lse = flash_attn_varlen_func(q, k, v, **lengths, return_lse=True)
        fake = (out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))
    assert [form(t) for t in fake] == [form(t) for t in real]


def attention(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q=None):
    """What a compiler may move and fuse around the operator."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, None, seqused_q, seqused_k)
    out, lse = flash_attn_varlen_func(
        q.sin(), k * 2, v + 1, *lengths, window_size=(7, 3), return_lse=True
    )
    return out.square().sum() + lse.clamp(min=-9).sin().sum()


def gradients(function, packed, *options):
    inputs = [x.clone().requires_grad_() for x in packed.qkv]
    loss = function(*inputs, *packed.lengths().values(), *options)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_gradients(backend):
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=backend, fullgraph=True, dynamic=False)
    assert_close(gradients(compiled, small()), gradients(attention, small()))


@pytest.mark.parametrize(("dynamic", "recompilations"), [(True, 0), (None, 1)])
def test_one_compilation_for_all_lengths(dynamic, recompilations):
    """Of totals, numbers of sequences, contents of cu_seqlens, and max_seqlen. What the compiler
    first takes for constants it compiles once more."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=dynamic)
    compilations = set()
    # None of them the number of heads: the compiler takes equal sizes for the same one.
    for seed, batch, longest in [(0, 5, 20), (1, 8, 25), (2, 8, 21), (3, 6, 40)]:
        packed = small(seed, batch=batch)
        assert_close(gradients(compiled, packed, longest), gradients(attention, packed, longest))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1 + recompilations


def test_contents_need_no_compilation():
    """Static shapes, the same buffer of cu_seqlens with other numbers in it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attn_varlen_func, backend=counter, fullgraph=True)
    q = torch.randn(30, 2, 16)
    cu_seqlens = torch.zeros(4, dtype=torch.int32)
    for contents in ([0, 10, 20, 30], [0, 0, 1, 30], [0, 5, 5, 7]):
        cu_seqlens.copy_(torch.tensor(contents))
        expected = flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, causal=True)
        assert torch.equal(compiled(q, q, q, cu_seqlens, cu_seqlens, causal=True), expected)
    assert counter.frame_count == 1


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_compiles_with_max_seqlen_from_a_tensor():
    """Its value is not known to the compiler. The operator checks it as it runs."""
    torch._dynamo.reset()

    def attend(q, cu_seqlens, bounds):
        longest = bounds.max().item()
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        return flash_attn_varlen_func(q, q, q, *lengths, causal=True)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    q, cu_seqlens = torch.randn(30, 2, 16), torch.tensor([0, 10, 30], dtype=torch.int32)
    expected = flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, causal=True)
    assert torch.equal(compiled(q, cu_seqlens, torch.tensor([10, 20])), expected)
    with pytest.raises(ValueError, match="max_seqlen_q is 19, must be at least 20"):
        compiled(q, cu_seqlens, torch.tensor([10, 19]))
    with pytest.raises(ValueError, match="max_seqlen_q is -1, must be at least 0 or None"):
        compiled(q, cu_seqlens, torch.tensor([-2, -1]))


def test_errors_come_through_the_compiler():
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_varlen_func, backend="aot_eager")
    q = torch.randn(30, 2, 16)
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[1\] is 31, must be at most 30"):
        compiled(q, q, q, *torch.tensor([[0, 31], [0, 30]], dtype=torch.int32))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    packed = small()
    _, *expected = gradients(attention, packed)
    inputs = [x.requires_grad_() for x in packed.qkv]
    loss = checkpoint(attention, *inputs, *packed.lengths().values(), use_reentrant=reentrant)
    loss.backward()
    assert_close([x.grad for x in inputs], expected)


@pytest.mark.parametrize("uses", ["out", "lse", "both"])
def test_gradient_of_either_output(device, uses):
    skip_unless_answered(device, torch.bfloat16)
    packed = small(dtype=torch.bfloat16, device=device)
    grad_out, grad_lse = random_grads(packed)
    inputs = [x.detach().requires_grad_() for x in packed.qkv]
    out, lse = flash_attn_varlen_func(*inputs, **packed.lengths(), causal=True, return_lse=True)
    pairs = {"out": [(out, grad_out)], "lse": [(lse, grad_lse)]}
    outputs, grads = zip(*pairs.get(uses, pairs["out"] + pairs["lse"]), strict=True)
    gradients = torch.autograd.grad(outputs, inputs, grads)
    if uses == "out":
        grad_lse = None
    if uses == "lse":
        grad_out = torch.zeros_like(grad_out)
    results = (out.detach(), lse.detach(), *gradients)
    assert_packed_right(results, packed, (grad_out, grad_lse), causal=True)


def test_gradcheck():
    torch.manual_seed(0)
    shapes = [(12, 4, 8), (11, 2, 8), (11, 2, 16)]
    packed = Packed(
        *(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes),
        [3, 0, 1, 5],
        [4, 2, 1, 3],
    )

    def attend(q, k, v):
        lengths = packed.lengths()
        out, lse = flash_attn_varlen_func(q, k, v, **lengths, window_size=(2, 1), return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(attend, packed.qkv)


def test_operator_called_directly_has_the_gradient_too():
    packed = small()
    inputs = [x.requires_grad_() for x in packed.qkv]
    lengths = packed.lengths()
    results = (
        flash_attn_varlen_forward(*inputs, *lengths.values(), None, 0.1, True),
        flash_attn_varlen_func(*inputs, **lengths, softmax_scale=0.1, causal=True, return_lse=True),
    )
    grads = [
        torch.autograd.grad(out.sum() + lse.clamp(min=-9).sum(), inputs) for out, lse in results
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_options_reach_the_operators(monkeypatch, deterministic):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function in (flash_attn_varlen_forward, flash_attn_varlen_backward):
                seen.append(keywords)
            return function(*arguments, **(keywords or {}))

    packed = small()
    options = {"window_size": (5, 2), "max_seqlen_q": 30, "deterministic": deterministic}
    asked = {"window_left": 5, "window_right": 2, "max_seqlen_q": 30}
    with Mode():
        packed.gradients(*random_grads(packed), **options)
        assert seen == [{**asked, **({"deterministic": True} if deterministic else {})}] * 2
        monkeypatch.setattr(varlen, "_always_deterministic", lambda: True)
        packed.gradients(*random_grads(packed), **options)
        assert seen[2:] == [{**asked, "deterministic": True}] * 2


def test_keeps_only_the_inputs_and_the_outputs():
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    packed = small()
    inputs = [x.requires_grad_() for x in packed.qkv]
    lengths = packed.lengths()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = flash_attn_varlen_func(*inputs, **lengths, return_lse=True)
    assert kept == [x.data_ptr() for x in (*inputs, *lengths.values(), *results)]


def test_gradient_flows_only_where_it_is_asked_for():
    packed = small()
    assert not packed.run()[0].requires_grad
    for tensor in packed.qkv:
        tensor.requires_grad_()
        out, _ = packed.run()
        assert out.requires_grad
        out.sum().backward()
        assert tensor.grad.abs().max() > 0
        with torch.no_grad():
            assert not packed.run()[0].requires_grad
        tensor.requires_grad_(False)


def test_autocast_leaves_the_precision_alone():
    packed = small()
    right = packed.gradients(*random_grads(packed))
    with torch.autocast("cpu", torch.bfloat16):
        results = packed.gradients(*random_grads(packed))
    assert all(torch.equal(a, b) for a, b in zip(results, right, strict=True))


# torch.func


def loss_of(packed):
    return lambda q, k, v: attention(q, k, v, *packed.lengths().values())


def test_transforms():
    packed = small(dtype=torch.float64)
    _, *right = gradients(attention, packed)
    assert_close(func.grad(loss_of(packed), (0, 1, 2))(*packed.qkv), right)
    _, pull_back = func.vjp(loss_of(packed), *packed.qkv)
    assert_close(pull_back(torch.ones((), dtype=torch.float64)), right)


REFUSED = {
    "vmap": (lambda f, *qkv: func.vmap(f)(*(x[None] for x in qkv)), "no rule for torch.func.vmap"),
    "vmap of grad": (
        lambda f, *qkv: func.vmap(func.grad(f), (0, None, None))(qkv[0][None], *qkv[1:]),
        "no rule for torch.func.vmap",
    ),
    "jacrev": (lambda f, *qkv: func.jacrev(lambda q: f(q, *qkv[1:]) * torch.ones(2))(qkv[0]), None),
    "jvp": (lambda f, *qkv: func.jvp(f, qkv, qkv), "no forward-mode derivatives"),
    "second derivative": (
        lambda f, *qkv: func.grad(lambda q: func.grad(f)(q, *qkv[1:]).sum())(qkv[0]),
        "flash_attn_varlen_func has no second derivative",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_transforms(what):
    transform, message = REFUSED[what]
    packed = small(dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=message):
        transform(loss_of(packed), *packed.qkv)


def test_second_derivative_is_refused():
    packed = small()
    q, k, v = (x.requires_grad_() for x in packed.qkv)
    out = flash_attn_varlen_func(q, k, v, **packed.lengths())
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_func has no second deriv"):
        grad.sum().backward()
