"""Random calls' gradients, and what is right of them."""

import torch
from parity import assert_gradients_right, random_qkv, skip_unless_built

from cute_kernels import flash_attn_func
from cute_kernels.operators import flash_attn_forward

MASKS = {"full": False, "causal": True}


def need_kernels(device, dtype, head_dim, causal):
    if device == "cuda":
        skip_unless_built(dtype, head_dim, causal, "forward")
        skip_unless_built(dtype, head_dim, causal, "backward")


def random_grads(q, with_lse=True, seed=9, head_dim_v=None):
    """Gradients of the output and of the LSE."""
    generator = torch.Generator(q.device).manual_seed(seed)
    options = {"generator": generator, "device": q.device}
    batch, seqlen, heads, head_dim = q.shape
    shape = (batch, seqlen, heads, head_dim if head_dim_v is None else head_dim_v)
    grad_out = torch.randn(shape, **options).to(q.dtype)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return grad_out, torch.randn(batch, heads, seqlen, **options, dtype=wide) if with_lse else None


def poison(*like):
    """Leaves NaN in the freed memory that gradients and workspace will be allocated from."""
    blocks = [torch.full(t.shape, torch.nan, dtype=t.dtype, device=t.device) for t in like * 3]
    blocks.append(torch.full((2 * sum(t.numel() for t in like),), torch.nan, device=like[0].device))
    del blocks


def gradients(q, k, v, grad_out, grad_lse=None, **arguments):
    """Gradients through flash_attn_func, with what is promised of their form checked."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    outputs, grads = [], [grad_out]
    if grad_lse is None:
        outputs.append(flash_attn_func(*inputs, **arguments))
    else:
        outputs.extend(flash_attn_func(*inputs, return_lse=True, **arguments))
        grads.append(grad_lse)
    poison(q, k)
    result = torch.autograd.grad(outputs, inputs, grads)
    for grad, tensor in zip(result, inputs, strict=True):
        assert grad.shape == tensor.shape
        assert grad.dtype == tensor.dtype
        assert grad.device == tensor.device
        assert grad.is_contiguous()
    return result


def check(q, k, v, causal=False, softmax_scale=None, with_lse=False, **arguments):
    grads = random_grads(q, with_lse)
    result = gradients(q, k, v, *grads, causal=causal, softmax_scale=softmax_scale, **arguments)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    assert_gradients_right(result, *grads, q, k, v, scale, causal)
    return result


def operator_arguments(device, dtype, with_lse, make_grad=lambda x: x, **sizes):
    """Of a causal, deterministic call of the backward operator."""
    q, k, v = random_qkv(device, dtype, **sizes)
    out, lse = flash_attn_forward(q, k, v, 0.3, True)
    grad_out, grad_lse = random_grads(q, with_lse)
    return make_grad(grad_out), grad_lse, q, k, v, out, lse, 0.3, True, True, None
