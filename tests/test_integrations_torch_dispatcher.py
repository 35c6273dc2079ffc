"""Calls that PyTorch's dispatcher brings here, its CPU key in place of CUDA's: autograd, compilers,
varlen_attn, nested tensors, rings; and what goes on to the kernels that were there before."""

import dataclasses
import random

import pytest
import torch
from aten_calls import FLASH, SDPA, form, heads_first, layouts, packed_call, state_of_dispatcher
from packed import Packed, assert_packed_right, random_grads, random_packed
from parity import assert_gradients_right, assert_right, random_qkv
from ring import run_ring
from torch.nn import attention

from cute_kernels.integrations import aten
from cute_kernels.integrations import torch as integration


@pytest.fixture
def overridden():
    """The operators have this package's kernels on the CPU, where PyTorch has none."""
    overrides = integration.Overrides("CPU")
    yield
    overrides.remove()


def attend(query, key, value, causal=True):
    return SDPA(query, key, value, 0.0, causal)[0]


def test_autograd_of_the_operator(overridden):
    q, k, v = random_qkv("cpu", torch.float32, 2, 17, 17, 4, 2, 16)
    inputs = [x.requires_grad_() for x in heads_first(q, k, v)]
    out = attend(*inputs)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    right = heads_first(grad_out, *(x.detach() for x in inputs))
    assert_gradients_right(heads_first(*grads), right[0], None, *right[1:], 0.25, True)
    assert_right(
        out.detach().transpose(1, 2), SDPA(*inputs, 0.0, True)[1].detach(), *right[1:], 0.25, True
    )


@pytest.mark.parametrize("layout", ["views", "contiguous"])
def test_compiled(overridden, layout):
    inputs = heads_first(*random_qkv("cpu", torch.float32, 2, 17, 17, 4, 2, 16))
    inputs = [layouts(x)[layout].detach().requires_grad_() for x in inputs]

    def block(query, key, value):
        return attend(query * 2, key, value).transpose(1, 2).flatten(2).sin()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for function in (block, compiled):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_varlen_attn(overridden):
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    packed = random_packed(random.Random(1), "cpu", torch.float32, [5, 9], [5, 9], (16, 16), (2, 2))
    arguments, _ = packed_call(packed)
    q, k, v = (x.requires_grad_() for x in packed.qkv)
    request = AuxRequest(lse=True)
    out, lse = varlen_attn(q, k, v, *arguments[3:-1], window_size=(-1, 0), return_aux=request)
    grad_out, _ = random_grads(packed)
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    packed = Packed(q.detach(), k.detach(), v.detach(), packed.slots_q, packed.slots_k)
    results = (out.detach(), lse.detach(), *grads)
    assert_packed_right(results, packed, (grad_out, None), causal=True)


def test_varlen_attn_into_an_output(overridden):
    from torch.nn.attention import varlen

    if not hasattr(varlen, "varlen_attn_out"):
        pytest.skip(f"torch {torch.__version__} has no varlen_attn_out")
    packed = random_packed(
        random.Random(1), "cpu", torch.float32, [5, 9], [7, 9], (16, 16), (4, 2), True
    )
    packed = dataclasses.replace(packed, used_q=None)
    arguments, seqused_k = packed_call(packed)
    out = torch.full_like(packed.q, torch.nan)
    _, lse = varlen.varlen_attn_out(
        out,
        *arguments[:-1],
        seqused_k=seqused_k,
        enable_gqa=True,
        return_aux=varlen.AuxRequest(lse=True),
    )
    assert_packed_right((out, lse), packed)


def test_nested_tensors(overridden, monkeypatch):
    """On the CPU PyTorch's choice is always the math backend: here flash is chosen for it."""
    from torch.nested._internal import sdpa

    chosen = lambda *_: attention.SDPBackend.FLASH_ATTENTION  # noqa: E731
    monkeypatch.setattr(sdpa, "_select_sdp_backend", chosen)
    slots = [3, 0, 11]
    packed = random_packed(random.Random(2), "cpu", torch.float32, slots, slots, (16, 16), (2, 2))
    q, k, v = (
        torch.nested.nested_tensor(list(x.split(slots)), layout=torch.jagged).transpose(1, 2)
        for x in packed.qkv
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    values = out.transpose(1, 2).values()
    lse = FLASH(*packed_call(packed)[0], True, False)[1]
    assert_packed_right((values, lse), packed, causal=True)


def test_ring_attention(tmp_path):
    """Context parallelism: two processes, keys of half of the lengths, global outputs and LSEs."""
    q, k, v, grad_out, *results = run_ring(tmp_path)
    assert_right(results[0].transpose(1, 2), results[1], *heads_first(q, k, v), 0.25, True)
    grads = heads_first(*results[2:])
    assert_gradients_right(grads, grad_out.transpose(1, 2), None, *heads_first(q, k, v), 0.25, True)


@pytest.fixture
def another_kernel():
    """The operators' kernels on the CPU are those of another implementation, which notes calls."""
    calls = []
    library = torch.library.Library("aten", "IMPL")

    def forward(*inputs, **options):
        calls.append((inputs, options))
        query = inputs[0]
        empty = query.new_empty(0)
        lse = query.new_zeros(query.shape[:3])
        return torch.full_like(query, 7.0), lse, None, None, 8, 8, empty, empty, empty

    def backward(*inputs, **options):
        calls.append((inputs, options))
        return tuple(torch.full_like(x, 5.0) for x in inputs[1:4])

    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_calls_share_what_nobody_reads(overridden, dtype):
    inputs = heads_first(*random_qkv("cpu", dtype, 2, 8, 8))
    inputs = [x.detach().requires_grad_() for x in inputs]
    alone = SDPA(*inputs)
    aten.keep_unread(torch.device("cpu"))
    try:
        calls = [SDPA(*inputs) for _ in range(2)]
        grads = [torch.autograd.grad(call[0].sum(), inputs) for call in calls]
    finally:
        aten.drop_unread()
    for call, grad in zip(calls, grads, strict=True):
        assert [form(x) for x in call] == [form(x) for x in alone]
        assert [x.data_ptr() for x in call[6:8]] == [x.data_ptr() for x in calls[0][6:8]]
        assert torch.equal(call[0], alone[0])
        right = torch.autograd.grad(alone[0].sum(), inputs, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(grad, right, strict=True))
    assert calls[0][6].data_ptr() != alone[6].data_ptr()


def test_what_is_not_answered_goes_on(another_kernel, overridden, recwarn):
    q, k, v = (x.requires_grad_() for x in heads_first(*random_qkv("cpu", torch.float32, 1, 8, 8)))
    out = SDPA(q, k, v, 0.0, True)[0]
    assert not another_kernel and not (out == 7).any()
    out = SDPA(q, k, v, 0.25, True, scale=0.5)[0]
    assert (out == 7).all()
    ((inputs, options),) = another_kernel
    assert inputs[3:] == (0.25, True) and options == {"scale": 0.5}
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(inputs, (q, k, v), strict=False))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert (grad == 5).all() and len(another_kernel) == 2
    assert not recwarn.list


def test_removal_gives_the_kernels_back(another_kernel):
    inputs = heads_first(*random_qkv("cpu", torch.float32, 1, 8, 8))
    before = state_of_dispatcher()
    overrides = integration.Overrides("CPU")
    assert state_of_dispatcher() != before
    assert not (SDPA(*inputs)[0] == 7).any()
    overrides.remove()
    assert state_of_dispatcher() == before
    assert (SDPA(*inputs)[0] == 7).all()
