"""Gradients against autograd of attention's definition, and the operator that computes them."""

import pytest
import torch
from gradients import MASKS, check, gradients, need_kernels, operator_arguments, random_grads
from parity import (
    DTYPES,
    GRID,
    assert_gradients_right,
    random_qkv,
)
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cute_kernels import flash_attn_func, interface, operators, tile_configs
from cute_kernels.autograd import dense
from cute_kernels.operators import flash_attn_backward, flash_attn_forward

OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "seqlens", "head_dim", "heads"), GRID)
def test_matches_the_definition(request, device, seqlens, head_dim, heads, dtype, mask):
    if device == "cuda":
        request.getfixturevalue("hopper")
        need_kernels(device, DTYPES[dtype], head_dim, MASKS[mask])
    batch = 1 if max(seqlens) > 4000 else 2
    q, k, v = random_qkv(device, DTYPES[dtype], batch, *seqlens, *heads, head_dim=head_dim)
    check(q, k, v, MASKS[mask], with_lse=head_dim == 128)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(device, head_dim, mask):
    need_kernels(device, torch.bfloat16, head_dim, MASKS[mask])
    q, k, v = random_qkv(device, torch.bfloat16, 1, 130, 190, 2, 1, head_dim=head_dim)
    check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen_k", [1, 15, 64, 65, 128, 129, 257, 512])
def test_lengths_around_the_blocks(device, seqlen_k, mask):
    head_dim = (64, 128, 256)[seqlen_k % 3]
    need_kernels(device, torch.float16, head_dim, MASKS[mask])
    for seqlen_q in (1, 63, 64, 65, 128, 193, 257):
        q, k, v = random_qkv(
            device, torch.float16, 1, seqlen_q, seqlen_k, 2, 1, head_dim=head_dim, seed=seqlen_q
        )
        check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("softmax_scale", [1e-4, 0.02, 0.3, 1.0])
def test_softmax_scale(device, softmax_scale, head_dim, mask):
    need_kernels(device, torch.bfloat16, head_dim, MASKS[mask])
    q, k, v = random_qkv(device, torch.bfloat16, 2, 200, 300, 4, 2, head_dim=head_dim)
    check(q, k, v, MASKS[mask], softmax_scale=softmax_scale, with_lse=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_smallest_softmax_scale(device, head_dim):
    """Every key has the same weight, though lse / softmax_scale is beyond a float."""
    need_kernels(device, torch.bfloat16, head_dim, causal=True)
    q, k, v = random_qkv(device, torch.bfloat16, 1, 200, 300, 4, 2, head_dim=head_dim)
    grad_out, _ = random_grads(q)
    tiny = gradients(q, k, v, grad_out, causal=True, softmax_scale=1.2e-38)
    assert tiny[0].abs().max() < 1e-36
    assert tiny[1].abs().max() < 1e-36
    _, _, grad_v = gradients(q, k, v, grad_out, causal=True, softmax_scale=1e-10)
    assert torch.equal(tiny[2], grad_v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_large_scores(device, head_dim, dtype):
    """Of hundreds, so that P is the difference of two large numbers."""
    need_kernels(device, DTYPES[dtype], head_dim, causal=False)
    q, k, v = random_qkv(device, DTYPES[dtype], 2, 200, 300, 4, 2, head_dim=head_dim)
    check(q * 16, k * 8, v, with_lse=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_that_see_no_key(device, head_dim):
    """Causal and bottom-right aligned: the first seqlen_q - seqlen_k queries have no gradient."""
    for seqlen_q, seqlen_k in [(300, 1), (300, 100), (1000, 437), (130, 129)]:
        need_kernels(device, torch.bfloat16, head_dim, causal=True)
        q, k, v = random_qkv(device, torch.bfloat16, 2, seqlen_q, seqlen_k, 4, 2, head_dim=head_dim)
        grad_q, _, _ = check(q, k, v, causal=True, with_lse=True)
        assert not grad_q[:, : seqlen_q - seqlen_k].any()


def test_keys_that_no_query_sees(device):
    """With one query none, with a causal mask and more keys than queries all but the last."""
    need_kernels(device, torch.bfloat16, 64, causal=True)
    q, k, v = random_qkv(device, torch.bfloat16, 1, 300, 300, 2)
    grad_out = torch.zeros_like(q)
    grad_out[:, :5] = 1.0
    _, grad_k, grad_v = gradients(q, k, v, grad_out, causal=True)
    assert grad_v[:, :5].any()
    assert not grad_k[:, 5:].any()
    assert not grad_v[:, 5:].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"heads": 0}, {"heads": 0, "key_heads": 2}],
    ids=str,
)
def test_empty_problems_have_zero_gradients(device, sizes, causal):
    need_kernels(device, torch.bfloat16, 64, causal)
    q, k, v = random_qkv(device, torch.bfloat16, **sizes)
    for grad in gradients(q, k, v, *random_grads(q), causal=causal):
        assert not grad.any()


@pytest.mark.parametrize("uses", ["out", "lse", "both"])
def test_gradient_of_either_output(device, uses):
    need_kernels(device, torch.bfloat16, 128, causal=True)
    q, k, v = random_qkv(device, torch.bfloat16, 2, 130, 190, 4, 2, head_dim=128)
    grad_out, grad_lse = random_grads(q)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = flash_attn_func(*inputs, causal=True, return_lse=True)
    chosen = {"out": [(out, grad_out)], "lse": [(lse, grad_lse)]}
    pairs = chosen["out"] + chosen["lse"] if uses == "both" else chosen[uses]
    outputs, grads = zip(*pairs, strict=True)
    result = torch.autograd.grad(outputs, inputs, grads)
    if uses == "out":
        grad_lse = None
    if uses == "lse":
        grad_out = torch.zeros_like(grad_out)
    assert_gradients_right(result, grad_out, grad_lse, q, k, v, 128**-0.5, True)


def expanded(grad):
    return grad[:1, :1, :1, :1].expand(grad.shape)


def permuted(grad):
    return grad.transpose(1, 2).contiguous().transpose(1, 2)


def head_dim_first(grad):
    return grad.transpose(1, 3).contiguous().transpose(1, 3)


def odd_pointer(grad):
    moved = grad.new_empty(grad.numel() + 1)[1:].view(grad.shape)
    return moved.copy_(grad)


def odd_strides(grad):
    return torch.nn.functional.pad(grad, (1, 2))[..., 1:-2]


@pytest.mark.parametrize(
    "layout",
    [expanded, permuted, head_dim_first, odd_pointer, odd_strides],
    ids=lambda f: f.__name__,
)
def test_layouts_change_nothing(device, layout):
    """Of the gradient that arrives, of q, k and v, and of what was kept."""
    need_kernels(device, torch.bfloat16, 64, causal=True)
    q, k, v = random_qkv(device, torch.bfloat16, 3, 150, 150, 4, 4)
    grad_out, grad_lse = random_grads(q)
    if layout is expanded:
        grad_out = grad_out[:1, :1, :1, :1].expand(q.shape)
    out, lse = flash_attn_forward(q, k, v, 0.125, True)

    def call(*tensors):
        return flash_attn_backward(*tensors, 0.125, True, True)

    def assert_same(grads):
        for grad, right in zip(grads, dense, strict=True):
            if device == "cuda":
                assert torch.equal(grad, right)
            else:  # PyTorch's own sums on the CPU depend on strides
                torch.testing.assert_close(grad, right)

    dense = call(grad_out.contiguous(), grad_lse, q, k, v, out, lse)
    lse_apart = torch.stack([lse, lse], -1)[..., 0]
    grad_lse_apart = grad_lse.transpose(0, 2).contiguous().transpose(0, 2)
    assert_same(call(layout(grad_out), grad_lse_apart, q, k, v, out, lse_apart))
    if layout not in (expanded, head_dim_first):
        moved = [layout(t) for t in (q, k, v, out)]
        assert_same(call(grad_out, grad_lse, *moved, lse))


def test_inputs_are_not_written(device):
    need_kernels(device, torch.bfloat16, 64, causal=True)
    q, k, v = random_qkv(device, torch.bfloat16)
    out, lse = flash_attn_forward(q, k, v, 0.125, True)
    arguments = (*random_grads(q), q, k, v, out, lse)
    copies = [t.clone() for t in arguments]
    flash_attn_backward(*arguments, 0.125, True, False)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


# Autograd and PyTorch's machinery


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_passed_on(monkeypatch, deterministic):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is flash_attn_backward:
                seen.append(arguments[9])
            return function(*arguments, **(keywords or {}))

    q, k, v = random_qkv("cpu", torch.float32)
    with Mode():
        gradients(q, k, v, torch.ones_like(q), deterministic=deterministic)
        assert seen == [deterministic]
        monkeypatch.setattr(interface, "_always_deterministic", lambda: True)
        gradients(q, k, v, torch.ones_like(q), deterministic=deterministic)
        assert seen == [deterministic, True]


@pytest.mark.parametrize("with_lse", [False, True])
def test_keeps_only_the_inputs_and_the_outputs(device, with_lse):
    need_kernels(device, torch.bfloat16, 64, causal=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    inputs = [t.requires_grad_() for t in random_qkv(device, torch.bfloat16)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = flash_attn_func(*inputs, causal=True, return_lse=with_lse)
    known = [t.data_ptr() for t in (*inputs, *(result if with_lse else [result]))]
    pointers = [t.data_ptr() for t in kept]
    if with_lse:
        assert pointers == known
    else:
        (lse,) = (t for t in kept if t.data_ptr() not in known)
        assert sorted(pointers) == sorted([*known, lse.data_ptr()])
        assert lse.shape == (2, 4, 128)


def test_modes_see_the_library_s_own_operator(device):
    need_kernels(device, torch.bfloat16, 64, causal=True)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    q, k, v = (t.requires_grad_() for t in random_qkv(device, torch.bfloat16))
    with Mode():
        flash_attn_func(q, k, v)
    assert seen[0] == "cute_kernels.flash_attn_forward.default"


def test_second_derivative_is_refused(device):
    need_kernels(device, torch.bfloat16, 64, causal=False)
    q, k, v = (t.requires_grad_() for t in random_qkv(device, torch.bfloat16))
    (grad,) = torch.autograd.grad(flash_attn_func(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("make_grad", [lambda x: x, permuted, expanded])
def test_opcheck(device, make_grad, with_lse):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    need_kernels(device, dtype, 64, causal=True)
    sizes = {"seqlen_q": 20, "seqlen_k": 30, "heads": 4, "key_heads": 2}
    arguments = operator_arguments(device, dtype, with_lse, make_grad, **sizes)
    result = torch.library.opcheck(flash_attn_backward, arguments, test_utils=OPCHECK)
    assert set(result.values()) == {"SUCCESS"}


def form(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def test_shape_inference_for_cuda_without_a_gpu():
    with FakeTensorMode():
        q = torch.empty(2, 6, 7, 72, device="cuda", dtype=torch.half).transpose(1, 2)
        k = torch.empty(2, 9, 3, 72, device="cuda", dtype=torch.half)
        out, lse = flash_attn_forward(q, k, k, 0.1, True)
        grads = flash_attn_backward(q, None, q, k, k, out, lse, 0.1, True, False)
    device = torch.device("cuda:0")
    assert form(grads[0]) == ((2, 7, 6, 72), (3024, 432, 72, 1), torch.half, device)
    assert form(grads[1]) == ((2, 9, 3, 72), (1944, 216, 72, 1), torch.half, device)
    assert form(grads[2]) == form(grads[1])


class Block(torch.nn.Module):
    """Attention with what a layer has around it."""

    def __init__(self, width=64, heads=2):
        super().__init__()
        self.heads = heads
        self.project = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return x + self.out(flash_attn_func(q, k, v, causal=True).flatten(-2))


def block_and_input(device):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = Block(128 if device == "cuda" else 32).to(device, dtype)
    x = torch.randn(2, 50, block.out.in_features, device=device, dtype=dtype, requires_grad=True)
    return block, x


def block_gradients(run, block, x):
    loss = run(x).float().square().sum()
    return loss.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device, reentrant):
    need_kernels(device, torch.bfloat16, 64, causal=True)
    block, x = block_and_input(device)
    expected = block_gradients(block, block, x)

    def run(x):
        return checkpoint(block, x, use_reentrant=reentrant)

    if reentrant:  # takes part in backward(), not in grad()
        run(x).float().square().sum().backward()
        actual = expected[0], *(t.grad for t in (x, *block.parameters()))
    else:
        actual = block_gradients(run, block, x)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(device, backend, checkpointed):
    need_kernels(device, torch.bfloat16, 64, causal=True)
    if device == "cuda" and backend == "inductor":
        pytest.skip("compiling for the GPU takes long; aot_eager sees the same graph")
    torch._dynamo.reset()
    block, x = block_and_input(device)
    expected = block_gradients(block, block, x)
    run = block if not checkpointed else lambda x: checkpoint(block, x, use_reentrant=False)
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for a, b in zip(block_gradients(compiled, block, x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_cuda_entry_of_a_build_without_backward_rows_refuses():
    assert torch._C._dispatch_has_kernel_for_dispatch_key(flash_attn_backward.name(), "CUDA")
    with pytest.raises(NotImplementedError, match="no kernels for gradients on CUDA"):
        operators._backward_not_built()


# What is changed about a good call of the operator, the kind of error on the CPU, and words of it.
BAD = {
    "grad_out of another shape": (
        {"grad_out": lambda t: t[:, 1:]},
        ValueError,
        r"\bgrad_out has shape \(2, 23, 4, 64\), must be \(2, 24, 4, 64\) like q",
    ),
    "grad_out of another dtype": (
        {"grad_out": lambda t: t.half()},
        TypeError,
        r"\bgrad_out has dtype torch.float16, must be torch.bfloat16 like q",
    ),
    "out of another rank": (
        {"out": lambda t: t[0]},
        ValueError,
        r"\bout has shape \(24, 4, 64\), must be \(2, 24, 4, 64\) like q",
    ),
    "lse transposed": (
        {"lse": lambda t: t.transpose(1, 2)},
        ValueError,
        r"\blse has shape \(2, 24, 4\), must be \(batch, heads, seqlen_q\) = \(2, 4, 24\)",
    ),
    "lse of another dtype": (
        {"lse": lambda t: t.bfloat16()},
        TypeError,
        r"\blse has dtype torch.bfloat16, must be torch.float32",
    ),
    "grad_lse of another shape": (
        {"grad_lse": lambda t: t[..., :1]},
        ValueError,
        r"\bgrad_lse has shape \(2, 4, 1\), must be .*= \(2, 4, 24\)",
    ),
    "k of another batch": (
        {"k": lambda t: t[:1]},
        ValueError,
        r"\bk has batch 1, must be 2 like q",
    ),
    "v strided in head_dim": (
        {"v": head_dim_first},
        ValueError,
        r"\bv has strides .*contiguous",
    ),
    "scale 0": ({"softmax_scale": lambda _: 0.0}, ValueError, "softmax_scale is 0.*greater than 0"),
    "a forward row": (
        {"tile_config": lambda _: tile_configs("forward")[0]["name"] + "_"},
        ValueError,
        r"tile_config is '.*', must be None \(automatic\) or the name of a backward row",
    ),
    "an index of a row": (
        {"tile_config": lambda _: 0},
        TypeError,
        r"tile_config is 0, must be None \(automatic\) or the name of a backward row",
    ),
    "k not a tensor": ({"k": lambda t: t.tolist()}, TypeError, r"\bk is a list, must be"),
}
NAMES = (
    "grad_out",
    "grad_lse",
    "q",
    "k",
    "v",
    "out",
    "lse",
    "softmax_scale",
    "causal",
    "deterministic",
    "tile_config",
)


@pytest.mark.parametrize("bad", BAD)
def test_refused(device, bad):
    need_kernels(device, torch.bfloat16, 64, causal=True)
    changes, error, message = BAD[bad]
    sizes = {"seqlen_q": 24, "seqlen_k": 32, "heads": 4, "key_heads": 2}
    good = dict(zip(NAMES, operator_arguments(device, torch.bfloat16, True, **sizes), strict=True))
    changed = {**good, **{name: change(good[name]) for name, change in changes.items()}}
    assert all(grad.isfinite().all() for grad in dense.backward_without_gradient(*good.values()))
    with pytest.raises(error, match=message):
        dense.backward_without_gradient(*changed.values())
    if device == "cpu":
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(error, match=message):
            dense.backward_without_gradient(*changed.values())
