"""attention_chunk: a query sees only keys of its own chunk; row by row against fp64."""

import random

import pytest
import torch
from oracle import Attention, assert_rows
from packed import assert_packed_right, random_grads, random_packed
from parity import (
    assert_gradients_right,
    assert_right,
    random_mask,
    random_qkv,
    skip_unless_answered,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_kernels import (
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)

CHUNKS = [1, 7, 64, 100, 2**40]


def on(device, head_dim=64):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    skip_unless_answered(device, dtype, head_dim)
    return dtype


@pytest.mark.parametrize("seqlens", [(1, 1), (150, 150), (40, 300), (300, 40), (64, 0)], ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_dense_calls(device, chunk, seqlens):
    chance = random.Random(chunk + seqlens[0])
    q, k, v = random_qkv(device, on(device), 2, *seqlens, 4, 2)
    sinks = torch.randn(4, device=device) if chance.random() < 0.5 else None
    mask = {"attention_chunk": chunk, **random_mask(chance)}
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_func(*inputs, sinks=sinks, return_lse=True, **mask)
    assert out.is_contiguous() and lse.is_contiguous()
    scale = q.shape[-1] ** -0.5
    assert_right(out.detach(), lse.detach(), q, k, v, scale, sinks=sinks, **mask)
    grads = torch.randn_like(out), torch.randn_like(lse)
    results = torch.autograd.grad((out, lse), inputs, grads)
    assert_gradients_right(results, *grads, q, k, v, scale, sinks=sinks, **mask)


@pytest.mark.parametrize("with_longest", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_packed_calls(device, seed, with_longest):
    """Chunks count from a sequence's first key, of the lengths that it uses."""
    chance = random.Random(seed)
    slots_q, slots_k = ([chance.choice([0, 1, 30, 64, 150]) for _ in range(5)] for _ in "qk")
    packed = random_packed(chance, device, on(device), slots_q, slots_k, (64, 64), (4, 2), True, 70)
    mask = {"attention_chunk": chance.choice([1, 16, 64, 1000]), **random_mask(chance)}
    longest = {"max_seqlen_q": 150, "max_seqlen_k": 151} if with_longest else {}
    grads = random_grads(packed)
    results = packed.gradients(*grads, **mask, **longest)
    assert_packed_right(results, packed, grads, **mask)


def test_gradient_of_sinks():
    q, k, v = random_qkv("cpu", torch.float32, 2, 50, 30, 4)
    sinks = torch.randn(4, requires_grad=True)
    out = flash_attn_func(q, k, v, attention_chunk=8, sinks=sinks)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    exact = Attention(q, k, v, 0.125, False, attention_chunk=8, sinks=sinks.detach())
    right, allowed = exact.sinks_gradient(grad_out)
    assert_rows("gradient of sinks", sinks.grad[:, None], right[:, None], allowed)


def test_none_is_none():
    q, k, v = random_qkv("cpu", torch.float32)
    assert torch.equal(flash_attn_func(q, k, v, attention_chunk=0), flash_attn_func(q, k, v))


def test_all_functions_take_it(device):
    qkv = torch.stack(random_qkv(device, on(device), 2, 40, 40, 4), 2)
    right = flash_attn_func(*qkv.unbind(2), causal=True, attention_chunk=16)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True, attention_chunk=16), right)


@pytest.mark.parametrize("longest", [2**31 - 1, 2**31, 2**40])
@pytest.mark.parametrize("chunk", [7, 2**29 + 1, 2**31, 2**35])
@pytest.mark.parametrize("function", [flash_attn_varlen_func, flash_attn_fp8_varlen_func])
def test_max_seqlen_may_be_anything_larger(function, longest, chunk):
    q, k, v = (x[0] for x in random_qkv("cpu", torch.float32, 1, 50, 50, 4))
    starts = torch.tensor([0, 20, 50], dtype=torch.int32)
    right = function(q, k, v, starts, starts, attention_chunk=min(chunk, 50))
    given = function(q, k, v, starts, starts, 50, longest, attention_chunk=chunk)
    assert torch.equal(given, right)


def attention(q, k, v, starts, chunk):
    return flash_attn_varlen_func(q, k, v, starts, starts, causal=True, attention_chunk=chunk)


def test_compiles_whole():
    q, k, v = (x[0] for x in random_qkv("cpu", torch.float32, 1, 50, 50, 4))
    starts = torch.tensor([0, 20, 50], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(q, k, v, starts, 13), attention(q, k, v, starts, 13))


def test_shape_inference():
    with FakeTensorMode():
        q, k = (torch.empty(2, n, 2, 64, dtype=torch.half) for n in (8, 30))
        out, lse = flash_attn_func(q, k, k, attention_chunk=16, return_lse=True)
    assert out.shape == q.shape and out.dtype == torch.half
    assert lse.shape == (2, 2, 8) and lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (-1, ValueError, "attention_chunk is -1, must be at least 0"),
        (1.5, TypeError, "attention_chunk is 1.5, must be an int"),
        (None, TypeError, "attention_chunk is None, must be an int"),
        (torch.ones(2), TypeError, r"attention_chunk is tensor\(.*\), must be an int"),
    ],
)
def test_wrong_chunks_are_named(chunk, error, message):
    q, k, v = random_qkv("cpu", torch.bfloat16)
    with pytest.raises(error, match=message):
        flash_attn_func(q, k, v, attention_chunk=chunk)


def test_other_errors_are_those_of_calls_without_chunks():
    q, k, v = random_qkv("cpu", torch.bfloat16)
    starts = torch.tensor([0, 128])
    with pytest.raises(ValueError, match=r"k has shape .*, must have 4 dimensions"):
        flash_attn_func(q, k[0], v, attention_chunk=8)
    with pytest.raises(TypeError, match=r"cu_seqlens_q has dtype torch.int64, must be torch.int32"):
        flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, attention_chunk=8)
    starts = starts.int()
    with pytest.raises(ValueError, match="max_seqlen_k is 50, must be at least 128, the rows that"):
        flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, max_seqlen_k=50, attention_chunk=8)
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[1\] is 129, must be at most 128"):
        flash_attn_varlen_func(q[0], k[0], v[0], starts + starts // 128, starts, attention_chunk=8)
    q = q.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="k has batch 1, must be 2 like q"):
        flash_attn_func(q, q[:1], q[:1], attention_chunk=8)
