"""The CPU path by itself: precision, gradients, and the blocks it works in."""

import itertools

import pytest
import torch
from parity import DTYPES, assert_gradients_right, check, plain_attention, random_qkv
from torch.utils._python_dispatch import TorchDispatchMode

from cute_kernels import flash_attn_func, reference

NARROW = {**DTYPES, "fp32": torch.float32}
MASKS = {"full": False, "causal": True}
SEQLENS = [(1, 1), (1, 700), (113, 203), (799, 3), (257, 256), (300, 513)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_output_and_lse(seqlens, dtype, mask):
    for heads, head_dim in [((4, 4), 64), ((6, 2), 40), ((3, 1), 256)]:
        q, k, v = random_qkv("cpu", NARROW[dtype], 2, *seqlens, *heads, head_dim=head_dim)
        check(q, k, v, MASKS[mask])


def test_long_sequence():
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 4224, 4224, 1, head_dim=40)
    check(q, k, v, causal=True)


@pytest.mark.parametrize("mask", MASKS)
def test_fp64_is_fp64_throughout(mask):
    q, k, v = random_qkv("cpu", torch.float64, 2, 150, 300, 4, 2, head_dim=16)
    out, lse = flash_attn_func(q, k, v, causal=MASKS[mask], return_lse=True)
    exact, exact_lse = plain_attention(q, k, v, 0.25, MASKS[mask], torch.float64)
    assert (out - exact).abs().max() < 1e-13
    assert (lse - exact_lse).abs().max() < 1e-13


def test_blocks_do_not_show(monkeypatch):
    """The same problem in blocks of other sizes, with gradients."""
    problem = random_qkv("cpu", torch.float64, 2, 37, 53, 4, 2, head_dim=8)
    results = []
    for query_block, key_block in [(128, 256), (1, 1), (5, 7), (37, 53), (16, 4)]:
        monkeypatch.setattr(reference, "QUERY_BLOCK", query_block)
        monkeypatch.setattr(reference, "KEY_BLOCK", key_block)
        inputs = [t.clone().requires_grad_() for t in problem]
        out, lse = flash_attn_func(*inputs, causal=True, return_lse=True)
        (out.square().sum() + lse.sum()).backward()
        results.append((out.detach(), lse.detach(), *(t.grad for t in inputs)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("seqlens", [(1, 1), (3, 5), (7, 7), (4, 9)], ids=str)
def test_gradcheck(monkeypatch, seqlens, heads, key_heads, mask):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 3)
    monkeypatch.setattr(reference, "KEY_BLOCK", 4)
    inputs = random_qkv("cpu", torch.float64, 2, *seqlens, heads, key_heads, head_dim=8)
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_attn_func(q, k, v, causal=MASKS[mask], return_lse=True), inputs
    )


def test_gradcheck_with_rows_that_see_no_key(monkeypatch):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 3)
    inputs = random_qkv("cpu", torch.float64, 1, 7, 3, 2, 1, head_dim=8)
    for tensor in inputs:
        tensor.requires_grad_()
    # Without the LSE, whose -inf has no difference quotient.
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_attn_func(q, k, v, 0.5, causal=True), inputs
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_match_those_of_the_definition(dtype, mask):
    causal, dtype = MASKS[mask], NARROW[dtype]
    q, k, v = random_qkv("cpu", dtype, 2, 160, 290, 4, 2, head_dim=32)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    grad = torch.randn(2, 160, 4, 32).to(dtype)
    grads = torch.autograd.grad(flash_attn_func(*inputs, 0.2, causal), inputs, grad)
    assert_gradients_right(grads, grad, None, *(t.detach() for t in inputs), 0.2, causal)


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"heads": 0}], ids=str
)
def test_gradients_of_empty_problems_are_zero(sizes):
    inputs = [t.requires_grad_() for t in random_qkv("cpu", torch.float32, **sizes)]
    flash_attn_func(*inputs, causal=True).sum().backward()
    for tensor in inputs:
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_gradients_of_strided_inputs():
    """Packed q, k, v and a permuted gradient of the output."""
    packed = torch.randn(2, 50, 3, 4, 16, requires_grad=True)
    apart = [t.detach().clone().requires_grad_() for t in packed.unbind(2)]
    grad = torch.randn(2, 4, 50, 16).transpose(1, 2)
    flash_attn_func(*packed.unbind(2), causal=True).backward(grad)
    flash_attn_func(*apart, causal=True).backward(grad)
    for part, tensor in zip(packed.grad.unbind(2), apart, strict=True):
        torch.testing.assert_close(part, tensor.grad)


def test_scores_are_never_stored_whole(monkeypatch):
    """GQA and long sequences in the memory of blocks: no tensor larger than the inputs in fp32."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    q, k, v = random_qkv("cpu", torch.float32, 1, 1000, 1000, 4, 1, head_dim=16)
    with Largest() as largest:
        out, _ = reference.attention_forward(q, k, v, 0.25, reference.mask_of(causal=True))
    assert out.isfinite().all()
    block = reference.QUERY_BLOCK * reference.KEY_BLOCK * q.shape[2]
    assert 0 < largest.elements <= max(q.numel(), block)


def test_same_bits_in_every_call():
    q, k, v = random_qkv("cpu", torch.bfloat16, 2, 300, 300, 4, 2)
    calls = [flash_attn_func(q, k, v, causal=True, return_lse=True) for _ in range(5)]
    for a, b in itertools.pairwise(calls):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
