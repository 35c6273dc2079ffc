"""Strides of 0, odd storage offsets, and more entries or heads than a dimension of a grid holds."""

import pytest
import torch
from parity import (
    BACKWARD_KERNELS,
    FORWARD_KERNELS,
    assert_gradients_right,
    assert_right,
    random_qkv,
    run,
    skip_unless_built,
)

from cute_kernels import flash_attn_func

# Dimensions of (batch, seqlen, heads, head_dim) with stride 0
EXPANDED = {(0,): "batch", (1,): "seqlen", (2,): "heads", (1, 2): "both", (0, 1, 2): "all three"}


def expand(x, dims):
    sizes = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
    return x[tuple(slice(size) for size in sizes)].contiguous().expand(x.shape)


def moved(x, offset):
    """The same numbers, `offset` elements into a storage."""
    storage = x.new_full((x.numel() + offset,), torch.nan)
    return storage[offset:].view(x.shape).copy_(x)


def problem_of(kernel):
    sizes = {"seqlen_q": 150, "seqlen_k": 210}
    sizes |= {"heads": kernel.heads, "key_heads": kernel.key_heads}
    return random_qkv(kernel.device, kernel.dtype, head_dim=kernel.head_dim, **sizes)


def layouts(q, k, v):
    """q, k and v in other layouts, by name."""
    for dims in EXPANDED:
        for expanded in ("q", "k", "v", "kv", "qkv"):
            inputs = zip("qkv", (q, k, v), strict=True)
            yield (
                f"{expanded} expanded in {EXPANDED[dims]}",
                [expand(x, dims) if name in expanded else x for name, x in inputs],
            )
    for offset in (1, 3, 8):
        yield f"offset {offset}", [moved(x, offset) for x in (q, k, v)]
        yield f"offset {offset}, expanded", [q, k, moved(v[:, :1], offset).expand(v.shape)]


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_strides_of_zero(kernel):
    for name, (q, k, v) in layouts(*problem_of(kernel)):
        out, lse = kernel.forward(q, k, v)
        if kernel.device == "cpu":  # PyTorch's own sums on the CPU depend on strides
            assert_right(out, lse, q, k, v, kernel.head_dim**-0.5, **kernel.mask)
        else:
            dense = kernel.forward(*(x.contiguous() for x in (q, k, v)))
            assert torch.equal(out, dense[0]), name
            assert torch.equal(lse, dense[1]), name


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
def test_gradients_with_strides_of_zero(kernel):
    """Of q, k, v, and of the gradient that arrives: that of a sum is one number everywhere."""
    problem, scale = problem_of(kernel), kernel.head_dim**-0.5
    grad_out = problem_of(kernel)[0].flip(1)
    calls = [(name, (*qkv, grad_out)) for name, qkv in layouts(*problem)]
    of_sum = grad_out.new_ones(()).expand(grad_out.shape)
    for grad in (of_sum, moved(grad_out, 1), *(expand(grad_out, dims) for dims in EXPANDED)):
        calls.append((f"gradient {grad.stride()}", (*problem, grad)))
    for name, tensors in calls:
        q, k, v, grad = (x.contiguous() for x in tensors)
        out, lse = flash_attn_func(q, k, v, causal=kernel.causal, return_lse=True)
        result = kernel.backward(tensors[3], None, *tensors[:3], out, lse, scale)
        if kernel.device == "cpu":
            assert_gradients_right(result, grad, None, q, k, v, scale, kernel.causal)
        else:
            dense = kernel.backward(grad, None, q, k, v, out, lse, scale)
            assert all(torch.equal(a, b) for a, b in zip(result, dense, strict=True)), name


# A grid's second and third dimension hold 65535.
MANY = [
    {"batch": 70000, "heads": 2, "key_heads": 1, "seqlen_q": 1, "seqlen_k": 1},
    {"batch": 70000, "heads": 1, "seqlen_q": 3, "seqlen_k": 2},
    {"batch": 66000, "heads": 1, "seqlen_q": 2, "seqlen_k": 70},
    {"batch": 1, "heads": 70000, "seqlen_q": 3, "seqlen_k": 3},
    {"batch": 1, "heads": 131073, "key_heads": 1, "seqlen_q": 2, "seqlen_k": 3},
    {"batch": 300, "heads": 300, "key_heads": 150, "seqlen_q": 1, "seqlen_k": 3},
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("sizes", MANY, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_more_than_65535_entries_or_heads(hopper, sizes, head_dim, causal):
    """Every entry and head, forward and backward, with gradients of both outputs."""
    for of_pass in ("forward", "backward"):
        skip_unless_built(torch.bfloat16, head_dim, causal, of_pass)
    q, k, v = random_qkv(hopper, torch.bfloat16, head_dim=head_dim, **sizes)
    out, lse = run(q, k, v, causal)
    grad_out, grad_lse = q.flip(0, 2), torch.ones_like(lse)
    scale = head_dim**-0.5
    for deterministic in (False, True):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        call = {"causal": causal, "return_lse": True, "deterministic": deterministic}
        grads = torch.autograd.grad(flash_attn_func(*inputs, **call), inputs, (grad_out, grad_lse))
        # Parts of the batch, for the memory that fp64 takes
        step = max(1, 4000 // sizes["heads"])
        for first in (0, 65536 // sizes["heads"], max(0, sizes["batch"] - step)):
            part = slice(first, first + step)
            assert_right(out[part], lse[part], q[part], k[part], v[part], scale, causal)
            assert_gradients_right(
                [grad[part] for grad in grads],
                *(x[part] for x in (grad_out, grad_lse, q, k, v)),
                scale,
                causal,
            )


@pytest.mark.parametrize("causal", [False, True])
def test_many_entries_and_many_heads_on_the_cpu(causal):
    for sizes in ({"batch": 66000, "heads": 1}, {"batch": 1, "heads": 66000, "key_heads": 2}):
        q, k, v = random_qkv("cpu", torch.bfloat16, seqlen_q=2, seqlen_k=1, head_dim=8, **sizes)
        out, lse = run(q, k, v, causal)
        assert_right(out, lse, q, k, v, 8**-0.5, causal)
