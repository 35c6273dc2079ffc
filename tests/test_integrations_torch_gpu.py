"""SDPA, varlen_attn and what else calls PyTorch's flash attention operators, on a GPU with this
package's kernels behind them."""

import random
import warnings

import pytest
import torch
from aten_calls import heads_first
from packed import assert_packed_right, random_grads, random_packed
from parity import (
    assert_gradients_right,
    assert_right,
    random_qkv,
    skip_unless_answered,
    skip_unless_built,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from cute_kernels import flash_attn_func, flash_attn_varlen_func
from cute_kernels.integrations import torch as integration

BF16 = torch.bfloat16
# batch, heads, key heads, seqlen, head dim
SHAPES = [(2, 4, 4, 300, 64), (1, 6, 2, 1025, 128), (2, 4, 1, 128, 40), (3, 2, 2, 1, 64)]


@pytest.fixture
def activated(hopper):
    integration.activate()
    yield hopper
    integration.deactivate()


def leaves(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def flash(*inputs, **options):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(*inputs, **options)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "heads", "key_heads", "seqlen", "head_dim"), SHAPES)
def test_sdpa(activated, batch, heads, key_heads, seqlen, head_dim, causal, contiguous):
    for of_pass in ("forward", "backward"):
        skip_unless_built(BF16, head_dim, causal, of_pass)
    q, k, v = random_qkv(activated, BF16, batch, seqlen, seqlen, heads, key_heads, head_dim)
    inputs = heads_first(q, k, v)
    if contiguous:
        inputs = [x.contiguous() for x in inputs]
    inputs = leaves(*inputs)
    options = {"is_causal": causal, "enable_gqa": heads != key_heads}
    out = sdpa(*inputs, **options)
    assert out.stride() == torch.empty_like(inputs[0]).stride() or seqlen == 1
    # The kernels are these: to the bit.
    assert torch.equal(out.transpose(1, 2), flash_attn_func(q, k, v, causal=causal))
    assert torch.equal(out, flash(*inputs, **options))
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    right = grad_out.transpose(1, 2)
    assert_gradients_right(heads_first(*grads), right, None, q, k, v, head_dim**-0.5, causal)


def test_a_causal_mask_is_aligned_top_left(activated):
    inputs = heads_first(*random_qkv(activated, BF16, 2, 100, 260))
    out = sdpa(*inputs, is_causal=True)
    mask = torch.ones(100, 260, dtype=torch.bool, device=activated).tril()
    right = sdpa(*(x.double() for x in inputs), attn_mask=mask)
    assert (out - right).abs().max() < 0.02


def test_a_causal_bias_is_aligned_where_it_says(activated):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = random_qkv(activated, BF16, 2, 100, 260)
    out = sdpa(*heads_first(q, k, v), attn_mask=causal_lower_right(100, 260))
    assert torch.equal(out.transpose(1, 2), flash_attn_func(q, k, v, causal=True))
    out = sdpa(*heads_first(q, k, v), attn_mask=causal_upper_left(100, 260))
    mask = torch.ones(100, 260, dtype=torch.bool, device=activated).tril()
    right = sdpa(*heads_first(q.double(), k.double(), v.double()), attn_mask=mask)
    assert (out - right).abs().max() < 0.02


CALLS = {
    "dropout": lambda q, k, v: sdpa(q, k, v, dropout_p=0.5),
    "mask": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones_like(q[0, 0, :, :1]).bool().mT),
    "fp32": lambda q, k, v: sdpa(q.float(), k.float(), v.float()),
    "head dim 264": lambda q, k, v: sdpa(*(torch.cat([x] * 5, -1)[..., :264] for x in (q, k, v))),
    "strides": lambda q, k, v: sdpa(*(x.mT.contiguous().mT for x in (q, k, v))),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_without_a_kernel_are_pytorchs(hopper, call):
    inputs = leaves(*heads_first(*random_qkv(hopper, BF16, 2, 64, 64)))

    def results():
        torch.manual_seed(0)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            out = call(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    before = results()
    integration.activate()
    try:
        during = results()
    finally:
        integration.deactivate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))


def test_deactivation_gives_pytorchs_bits_back(hopper):
    inputs = leaves(*heads_first(*random_qkv(hopper, BF16, 2, 500, 500)))

    def results():
        out = sdpa(*inputs, is_causal=True)
        return [out, flash(*inputs), torch.autograd.grad(flash(*inputs).sum(), inputs[2])[0]]

    before = results()
    integration.activate()
    during = results()
    integration.deactivate()
    assert all(torch.equal(a, b) for a, b in zip(before, results(), strict=True))
    assert not torch.equal(before[1], during[1])


@pytest.mark.parametrize("contiguous", [False, True])
def test_compiled(activated, contiguous):
    inputs = heads_first(*random_qkv(activated, BF16, 2, 130, 130))
    if contiguous:
        inputs = [x.contiguous() for x in inputs]
    inputs = leaves(*inputs)

    def block(q, k, v):
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    compiled = torch.compile(block, fullgraph=True)
    out = compiled(*inputs)
    assert torch.equal(out, block(*inputs))
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    q, k, v = heads_first(*(x.detach() for x in inputs))
    assert_gradients_right(
        heads_first(*grads), grad_out.unflatten(2, (4, 64)), None, q, k, v, 0.125, True
    )


def test_a_cached_program_of_another_choice_is_not_run(hopper):
    q, k, v = random_qkv(hopper, BF16, 2, 131, 131)
    inputs = heads_first(q, k, v)
    compiled = torch.compile(lambda *x: sdpa(*x).transpose(1, 2), fullgraph=True)
    before = compiled(*inputs)
    integration.activate()
    try:
        torch.compiler.reset()
        assert torch.equal(compiled(*inputs), flash_attn_func(q, k, v))
    finally:
        integration.deactivate()
    torch.compiler.reset()
    assert torch.equal(compiled(*inputs), before)


def test_varlen_attn(activated):
    from torch.nn.attention.varlen import varlen_attn

    skip_unless_answered(activated, BF16)
    slots = [70, 0, 1, 400]
    packed = random_packed(random.Random(0), activated, BF16, slots, slots, (64, 64), (4, 4))
    inputs = leaves(*packed.qkv)
    cu_seqlens = packed.lengths()["cu_seqlens_q"]
    out = varlen_attn(*inputs, cu_seqlens, cu_seqlens, 400, 400, window_size=(-1, 0))
    ours, lse = flash_attn_varlen_func(
        *packed.qkv, cu_seqlens, cu_seqlens, 400, 400, causal=True, return_lse=True
    )
    assert torch.equal(out, ours)
    # By this package's kernels or by PyTorch's, from this package's output and LSE.
    grad_out, _ = random_grads(packed)
    grads = torch.autograd.grad(out, inputs, grad_out)
    assert_packed_right((ours, lse, *grads), packed, (grad_out, None), causal=True)


def test_nested_tensors(activated):
    skip_unless_answered(activated, BF16)
    slots = [70, 3, 400]
    packed = random_packed(random.Random(0), activated, BF16, slots, slots, (64, 64), (4, 4))
    q, k, v = (
        torch.nested.nested_tensor(list(x.split(slots)), layout=torch.jagged).transpose(1, 2)
        for x in packed.qkv
    )
    out = flash(q, k, v).transpose(1, 2).values()
    cu_seqlens = packed.lengths()["cu_seqlens_q"]
    assert torch.equal(out, flash_attn_varlen_func(*packed.qkv, cu_seqlens, cu_seqlens, 400, 400))


def test_the_first_call_of_a_shape_is_in_a_cuda_graph(activated):
    q, k, v = random_qkv(activated, BF16, 2, 77, 77)
    sdpa(*heads_first(*random_qkv(activated, BF16)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sdpa(*heads_first(q, k, v))
    q.copy_(q.flip(1))
    graph.replay()
    right = flash_attn_func(q, k, v)
    assert torch.equal(out.transpose(1, 2), right)
    lse = flash_attn_func(q, k, v, return_lse=True)[1]
    assert_right(right, lse, q, k, v, 0.125, False)


def test_autocast(activated):
    inputs = leaves(*heads_first(*random_qkv(activated, torch.float32, 2, 65, 65)))
    with torch.autocast("cuda", dtype=BF16):
        out = sdpa(*inputs)
    q, k, v = heads_first(*(x.detach().to(BF16) for x in inputs))
    assert torch.equal(out.transpose(1, 2), flash_attn_func(q, k, v))
    assert torch.autograd.grad(out.sum(), inputs[0])[0].dtype == torch.float32
