"""PyTorch's flash attention operators: calls of them, and the form of what they give back."""

import pytest
import torch

from cute_kernels.integrations import torch as integration

if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
    pytest.skip("needs the registry of torch 2.11 or newer", allow_module_level=True)

SDPA = torch.ops.aten._scaled_dot_product_flash_attention
SDPA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
FLASH = torch.ops.aten._flash_attention_forward
FLASH_BACKWARD = torch.ops.aten._flash_attention_backward


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def layouts(x):
    """(batch, heads, seqlen, head_dim) of other strides: from the sequence outside of the heads, of
    heads outside of the sequence, and of one tensor with something else."""
    wide = torch.stack([x, x], dim=3).transpose(1, 2)
    return {"views": x, "contiguous": x.contiguous(), "parts": wide[:, :, :, 0].transpose(1, 2)}


def form(tensor):
    if not isinstance(tensor, torch.Tensor):
        return tensor
    empty = tensor.numel() == 0  # then, and of a size of 1, nothing uses a stride
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    strides = [] if empty else [stride for size, stride in strides if size > 1]
    return tensor.shape, tensor.dtype, strides


def on_meta(inputs):
    """Of other strides than meta's own `to` would keep."""

    def moved(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    return [moved(x) if isinstance(x, torch.Tensor) else x for x in inputs]


def assert_form_inferred(operator, inputs, results, **options):
    """Shapes, dtypes and strides are those that PyTorch tells compilers."""
    inferred = operator(*on_meta(inputs), **options)
    assert [form(x) for x in results] == [form(x) for x in inferred]


def packed_call(packed):
    lengths = packed.lengths()
    longest = [max(slots, default=0) for slots in (packed.slots_q, packed.slots_k)]
    cumulative = (lengths["cu_seqlens_q"], lengths["cu_seqlens_k"])
    return (*packed.qkv, *cumulative, *longest, 0.0), lengths["seqused_k"]


def state_of_dispatcher():
    names = [name for name in integration._ANSWERS if hasattr(torch.ops.aten, name)]
    return [torch._C._dispatch_dump(f"aten::{name}") for name in names]
