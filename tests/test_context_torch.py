"""PyTorch's own context_parallel, whose local steps are this package's kernels."""

import pytest
import ranks as processes
import torch
from oracle import Attention, assert_rows
from parity import assert_gradients_right

from cute_kernels import distributed

if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
    pytest.skip("needs the registry of torch 2.11 or newer", allow_module_level=True)


def whole_inputs(dtype, tokens, heads, key_heads, head_dim):
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, tokens, n, head_dim) for n in (heads, key_heads, key_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend(rank, device, dtype, tokens, *sizes):
    """Whole output and gradients of q, k and v, with a causal mask."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn import functional

    from cute_kernels.integrations import torch as integration

    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    whole = [x.to(device) for x in whole_inputs(dtype, tokens, *sizes)]
    *qkv, grad_out = (distributed.shard(x, mesh).transpose(1, 2) for x in whole)
    qkv = [x.contiguous().requires_grad_() for x in qkv]
    answered = count_answers(integration)
    if device == "cuda":
        integration.activate()
    else:
        overrides = integration.Overrides("CPU")  # in force while it is referred to
        assert overrides is not None
        functional.scaled_dot_product_attention = scaled_dot_product_attention
    something = torch.zeros(tokens, device=device)  # it wants a tensor to cut
    with context_parallel(mesh, buffers=[something], buffer_seq_dims=[0]):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = functional.scaled_dot_product_attention(
                *qkv, is_causal=True, enable_gqa=sizes[0] != sizes[1]
            )
        grads = torch.autograd.grad(out, qkv, grad_out)
    # A step for each rank's keys, and as many back; PyTorch's own kernels would be as right.
    assert answered == [mesh.size()] * 2, answered
    results = [x.detach().transpose(1, 2) for x in (out, *grads)]
    return [distributed.unshard(x, mesh).cpu() for x in results]


def count_answers(integration):
    """How often this package will have answered, forward and backward."""
    answered = [0, 0]
    for i, suffix in enumerate(("", "_backward")):
        name = f"_scaled_dot_product_flash_attention{suffix}"
        answer = integration._ANSWERS[name]

        def counted(*inputs, i=i, answer=answer, **options):
            result = answer(*inputs, **options)
            answered[i] += result is not NotImplemented
            return result

        integration._ANSWERS[name] = counted
    return answered


def scaled_dot_product_attention(query, key, value, is_causal=False, enable_gqa=False):
    """As on CUDA: on the CPU, PyTorch takes another operator for it."""
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, is_causal=is_causal
    )[0]


def check(ranks, backend, *call):
    _, dtype, *sizes = call
    out, *grads = processes.run(ranks, attend, *call, backend=backend)[0]
    *qkv, grad_out = whole_inputs(dtype, *sizes)
    exact = Attention(*qkv, sizes[-1] ** -0.5, True)
    assert_rows("output", out, exact.out, exact.out_allowed())
    assert_gradients_right(grads, grad_out, None, *qkv, sizes[-1] ** -0.5, True)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_on_the_cpu(heads):
    check(2, "gloo", "cpu", torch.float32, 24, *heads, 16)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_on_gpus(gpus, heads):
    check(gpus, "nccl", "cuda", torch.bfloat16, 1024, *heads, 64)
